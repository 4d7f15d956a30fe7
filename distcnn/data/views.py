"""From an image of any size to the model's square: what is cut out, and how it is scaled. Runs in loader threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from distcnn.data import keyed
from distcnn.data.decode import Pixels

RATIO_RANGE = (3 / 4, 4 / 3)
TRIES = 10
EVALUATION_SHARE = 0.875  # of the shorter side that an evaluation looks at: 224 of 256


@dataclass(frozen=True)
class View:
    """How an image becomes S x S.

    * none: it has that size already;
    * center: the middle 87.5 % of the shorter side, scaled;
    * random-resized: a random box of `scale` .. 1 of the area and a ratio of 3/4 .. 4/3 (Szegedy et al., "Going deeper
      with convolutions", 2015; drawn as torchvision's RandomResizedCrop draws it), scaled.
    """

    size: int
    kind: Literal["none", "center", "random-resized"]
    scale: float = 0.35

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.scale <= 1:
            raise ValueError(f"view of {self.size} px, scale {self.scale}")

    def boxes(
        self, ids: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64], seed: int, epoch: int
    ) -> NDArray[np.int64]:
        """(n, 4) int64 (top, left, height, width) of what is cut out of n images of these sizes in pixels."""
        if self.kind == "random-resized":
            return _random_resized(ids, heights, widths, self.scale, seed, epoch)
        side = np.minimum(heights, widths)
        side = np.maximum(np.rint(side * EVALUATION_SHARE).astype(np.int64), 1)
        return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def _random_resized(
    ids: NDArray[np.int64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    scale: float,
    seed: int,
    epoch: int,
) -> NDArray[np.int64]:
    """The first of ten tries that fits, else the largest centred box within the allowed ratios."""
    boxes = _largest_centred(heights, widths)
    missing = np.ones(len(ids), dtype=bool)
    low, high = np.log(RATIO_RANGE)
    for attempt in range(TRIES):
        key = ids * TRIES + attempt
        area = heights * widths * (scale + (1 - scale) * keyed.uniform(key, seed, epoch, keyed.AREA))
        ratio = np.exp(low + (high - low) * keyed.uniform(key, seed, epoch, keyed.RATIO))
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = missing & (w > 0) & (h > 0) & (w <= widths) & (h <= heights)
        top = (keyed.uniform(key, seed, epoch, keyed.CROP_TOP) * (heights - h + 1)).astype(np.int64)
        left = (keyed.uniform(key, seed, epoch, keyed.CROP_LEFT) * (widths - w + 1)).astype(np.int64)
        boxes[fits] = np.stack([top, left, h, w], axis=1)[fits]
        missing &= ~fits
        if not missing.any():
            break
    return boxes


def _largest_centred(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    h = np.minimum(heights, np.rint(widths / RATIO_RANGE[0]).astype(np.int64))
    w = np.minimum(widths, np.rint(heights * RATIO_RANGE[1]).astype(np.int64))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def resize_into(out: Pixels, pixels: Pixels, box: NDArray[np.int64]) -> None:
    """Cut `box` out of (H, W, 3) pixels and scale it into `out` (S, S, 3): bilinear with antialias."""
    top, left, height, width = box.tolist()
    cut_HWC = pixels[top : top + height, left : left + width]
    side = out.shape[0]
    if (height, width) == (side, side):
        out[:] = cut_HWC
        return
    if not cut_HWC.flags.writeable:  # Pillow's pixels; torch warns of them
        cut_HWC = cut_HWC.copy()
    # The strides of channels_last take the fast path of torch's uint8 kernel.
    cut_NCHW = torch.from_numpy(cut_HWC).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(cut_NCHW, size=(side, side), mode="bilinear", antialias=True)
    out[:] = scaled[0].permute(1, 2, 0).numpy()
