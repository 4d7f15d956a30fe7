"""From an image of any size to the model's square: which part of it is looked at. See resize.py for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distcnn.data import keyed

RATIO_RANGE = (3 / 4, 4 / 3)
TRIES = 10
_AT_ONCE = (np.arange(4), np.arange(4, TRIES))  # few boxes need more than four
_DRAWS = (keyed.AREA, keyed.RATIO, keyed.CROP_TOP, keyed.CROP_LEFT)
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

    def at(self, epoch: int) -> View:
        """The view that training takes in an epoch."""
        return self

    def boxes(
        self, ids: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64], seed: int, epoch: int
    ) -> NDArray[np.int64]:
        """(n, 4) int64 (top, left, height, width) of what is cut out of n images of these sizes in pixels."""
        if self.kind == "random-resized":
            return _random_resized(ids, heights, widths, self.scale, seed, epoch)
        side = np.minimum(heights, widths)
        side = np.maximum(np.rint(side * EVALUATION_SHARE).astype(np.int64), 1)
        return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


@dataclass(frozen=True)
class ProgressiveView(View):
    """Random-resized crops of other sizes in turn, an equal share of the epochs each. `size` is the largest."""

    sizes: tuple[int, ...] = ()
    epochs: int = 1

    @staticmethod
    def of(sizes: tuple[int, ...], epochs: int, scale: float) -> ProgressiveView:
        return ProgressiveView(max(sizes), "random-resized", scale, sizes, epochs)

    def at(self, epoch: int) -> View:
        """The view of that epoch, counted from 0; beyond the last one, the last size."""
        place = min(len(self.sizes) * epoch // self.epochs, len(self.sizes) - 1)
        return View(self.sizes[place], self.kind, self.scale)


def _random_resized(
    ids: NDArray[np.int64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    scale: float,
    seed: int,
    epoch: int,
) -> NDArray[np.int64]:
    """The first of ten tries that fits, else the largest centred box within the allowed ratios."""
    boxes = np.empty((len(ids), 4), dtype=np.int64)
    left_over = np.arange(len(ids))
    low, high = np.log(RATIO_RANGE)
    for tries in _AT_ONCE:  # several at once: calls of NumPy take longer than what they compute for a few hundred boxes
        keys = ids * TRIES + tries[:, None]  # (T, n)
        draws = keyed.uniforms(keys.reshape(-1), seed, epoch, _DRAWS)
        area_draw, ratio_draw, top_draw, left_draw = draws.reshape(len(_DRAWS), *keys.shape)
        area = heights * widths * (scale + (1 - scale) * area_draw)
        ratio = np.exp(low + (high - low) * ratio_draw)
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        top = (top_draw * (heights - h + 1)).astype(np.int64)
        left = (left_draw * (widths - w + 1)).astype(np.int64)
        fits = (w > 0) & (h > 0) & (w <= widths) & (h <= heights)
        first = fits.argmax(axis=0), np.arange(len(ids))
        boxes[left_over] = np.array((top[first], left[first], h[first], w[first])).T  # of no fit: is written over
        again = ~fits[first]
        if not again.any():
            return boxes
        left_over, ids, heights, widths = left_over[again], ids[again], heights[again], widths[again]
    boxes[left_over] = _largest_centred(heights, widths)
    return boxes


def _largest_centred(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    h = np.minimum(heights, np.rint(widths / RATIO_RANGE[0]).astype(np.int64))
    w = np.minimum(widths, np.rint(heights * RATIO_RANGE[1]).astype(np.int64))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def reduction(box: Sequence[int], size: int) -> int:
    """8, 4, 2 or 1: by how much an image may be reduced while it is decoded, so that `box` still has `size` pixels."""
    factor = min(box[2], box[3]) // size
    return 8 if factor >= 8 else 4 if factor >= 4 else 2 if factor >= 2 else 1
