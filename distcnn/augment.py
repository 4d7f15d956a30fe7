"""From uint8 tiles to normalised model inputs, in batches, on the device.

Every random choice is keyed by (seed, epoch, sample id, operation), or for what involves several samples by (seed,
epoch, step, lane): see data/keyed.py. N samples, H W pixels, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from distcnn.data import keyed
from distcnn.data.loader import Tile
from distcnn.data.order import Ids
from distcnn.pixels import Window, crop_padded, fill_boxes_, mirrored, normalise, to_device
from distcnn.trivial import blend, column_of, luma, mean_of, trivial_augment

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
TRIES = 10
_ERASE_DRAWS = (keyed.ERASE_AREA, keyed.ERASE_RATIO, keyed.ERASE_TOP, keyed.ERASE_LEFT)


@dataclass(frozen=True)
class Targets:
    """What a tile should come out as: `share` of the loss against labels, the rest against the partners' labels."""

    labels: torch.Tensor  # (n,) int64
    partner_labels: torch.Tensor  # (n,) int64
    share: float
    weights: torch.Tensor  # (n,) float32
    teacher_logits: torch.Tensor | None = None  # (n, K): what --distill's teacher says of the same inputs


@dataclass(frozen=True)
class Augment:
    """What is done to a training tile, in this order. With `train=False` images are only normalised.

    * padding: crops of the image padded by so many pixels, black or (`reflect`) mirrored;
    * flip: mirrored left-right at random, or "alternate": at random in epoch 0, then every other epoch (Jordan, "94% on
      CIFAR-10 in 3.29 seconds on a single GPU", 2024);
    * trivial: TrivialAugment, see trivial.py;
    * jitter: brightness, contrast and saturation, in this order, each times a factor of 1 - jitter .. 1 + jitter;
    * erasing: the probability of a box of mean gray, 2 to 33 % of the area, ratio 0.3 to 3.3 (Zhong et al., "Random
      erasing data augmentation", AAAI 2020; drawn as torchvision draws it);
    * cutout: the side in pixels of a square of mean gray around any pixel, cut at the edges (DeVries & Taylor, 2017);
    * mixup, cutmix: alpha of their Beta distributions; partners lie in the same tile.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    padding: int = 0
    reflect: bool = False
    flip: Literal["none", "random", "alternate"] = "none"
    trivial: bool = False
    jitter: float = 0.0
    erasing: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, tile: Tile, device: torch.device, train: bool) -> tuple[torch.Tensor, Targets]:
        """(n, 3, S, S) float32 in channels_last, and its Targets, on `device`."""
        images_NHWC = tile.images.to(device, non_blocking=True)
        labels = tile.labels.to(device, non_blocking=True)
        weights = tile.weights.to(device, non_blocking=True)
        targets = Targets(labels, labels, 1.0, weights)
        epoch, ids = tile.request.epoch, tile.request.ids
        if not train or not len(ids):
            return normalise(images_NHWC, self.mean, self.std), targets
        window, flipped = self.window(ids, epoch), self.flipped(ids, epoch)
        if self.trivial or self.jitter:
            cropped = images_NHWC if window is None else crop_padded(images_NHWC, window)
            images_NHWC = self.recolour(mirrored(cropped, flipped), ids, epoch)
            window = flipped = None
        x_NCHW = normalise(images_NHWC, self.mean, self.std, flipped, window)
        self.cut_out_(x_NCHW, ids, epoch)
        if (self.mixup or self.cutmix) and len(ids) > 1:
            return self._mix(x_NCHW, targets, epoch, keyed.tile_key(tile.request.step, tile.request.lane))
        return x_NCHW, targets

    def window(self, ids: Ids, epoch: int) -> Window | None:
        """What is cut out of each padded image, or None for all of it."""
        if not self.padding:
            return None
        draws = keyed.uniforms(ids, self.seed, epoch, (keyed.CROP_TOP, keyed.CROP_LEFT))
        top, left = (draws * (2 * self.padding + 1)).astype(np.int64)
        return Window(top, left, self.padding, self.reflect)

    def flipped(self, ids: Ids, epoch: int) -> NDArray[np.bool_] | None:
        """Which images are mirrored (n,), or None for none."""
        if self.flip == "none":
            return None
        alternate = self.flip == "alternate"
        flipped = keyed.uniform(ids, self.seed, 0 if alternate else epoch, keyed.FLIP) < 0.5
        return flipped ^ (epoch % 2 == 1) if alternate else flipped

    def recolour(self, images_NHWC: torch.Tensor, ids: Ids, epoch: int) -> torch.Tensor:
        """(n, S, S, 3) of values 0 .. 255, uint8 or float32."""
        if self.trivial:
            images_NHWC = trivial_augment(images_NHWC, ids, self.seed, epoch)
        if self.jitter:
            draws = keyed.uniforms(ids, self.seed, epoch, (keyed.BRIGHTNESS, keyed.CONTRAST, keyed.SATURATION))
            low = max(1 - self.jitter, 0.0)
            brightness, contrast, saturation = (
                column_of(factor, images_NHWC) for factor in low + (1 + self.jitter - low) * draws
            )
            images_NHWC = blend(images_NHWC, 0.0, brightness)
            images_NHWC = blend(images_NHWC, mean_of(luma(images_NHWC)), contrast)
            images_NHWC = blend(images_NHWC, luma(images_NHWC), saturation)
        return images_NHWC

    def cut_out_(self, x_NCHW: torch.Tensor, ids: Ids, epoch: int) -> None:
        """Fill boxes of normalised images with the mean, which is 0, in place."""
        side = x_NCHW.shape[-1]
        if self.erasing:
            fill_boxes_(x_NCHW, erased_boxes(ids, side, self.erasing, self.seed, epoch), 0.0)
        if self.cutout:
            fill_boxes_(x_NCHW, cutout_boxes(ids, side, self.cutout, self.seed, epoch), 0.0)

    def _mix(self, x_NCHW: torch.Tensor, targets: Targets, epoch: int, key: int) -> tuple[torch.Tensor, Targets]:
        """MixUp (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019) with partners of the same tile."""
        floats = keyed.stream(key, self.seed, epoch, keyed.MIX_KIND)
        kind: Literal["mixup", "cutmix"] = "mixup" if self.mixup else "cutmix"
        if self.mixup and self.cutmix:
            kind = "mixup" if next(floats) < 0.5 else "cutmix"
        share = keyed.beta(self.mixup if kind == "mixup" else self.cutmix, floats)
        partner = to_device(partners(len(x_NCHW), key, self.seed, epoch), x_NCHW.device)
        if kind == "mixup":
            mixed = x_NCHW * share + x_NCHW[partner] * (1 - share)
        else:
            top, bottom, left, right = cut_box(x_NCHW.shape[-1], share, next(floats), next(floats))
            mixed = x_NCHW.clone(memory_format=torch.channels_last)
            mixed[:, :, top:bottom, left:right] = x_NCHW[partner, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / x_NCHW.shape[-1] ** 2
        weights = targets.weights * targets.weights[partner]
        return mixed, Targets(targets.labels, targets.labels[partner], share, weights)


def partners(n: int, key: int, seed: int, epoch: int) -> Ids:
    """(n,) int64: a uniform permutation of a tile's places; an image may be its own partner, as in the papers' code."""
    floats = keyed.stream_of(n, key, seed, epoch, keyed.MIX_PARTNER)
    return np.argsort(floats, kind="stable").astype(np.int64)


def erased_boxes(ids: Ids, side: int, probability: float, seed: int, epoch: int) -> NDArray[np.int64]:
    """(n, 4) top, left, height, width of random erasing's boxes: the first of ten tries that fits; else none."""
    boxes = np.zeros((len(ids), 4), dtype=np.int64)
    left_over = np.flatnonzero(keyed.uniform(ids, seed, epoch, keyed.ERASE) < probability)
    (low, high), (flat, tall) = ERASED_AREA, np.log(ERASED_RATIO)
    for attempt in range(TRIES):
        key = ids[left_over] * TRIES + attempt
        area_draw, ratio_draw, top_draw, left_draw = keyed.uniforms(key, seed, epoch, _ERASE_DRAWS)
        area = side * side * (low + (high - low) * area_draw)
        ratio = np.exp(flat + (tall - flat) * ratio_draw)
        height, width = (np.rint(np.sqrt(x)).astype(np.int64) for x in (area * ratio, area / ratio))
        top, left = (top_draw * (side - height + 1)).astype(np.int64), (left_draw * (side - width + 1)).astype(np.int64)
        fits = (height < side) & (width < side)
        boxes[left_over[fits]] = np.array((top, left, height, width)).T[fits]
        left_over = left_over[~fits]
        if not len(left_over):
            break
    return boxes


def cutout_boxes(ids: Ids, side: int, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(n, 4) top, left, height, width of squares of `size` around any pixel, cut at the edges."""
    middle = (keyed.uniforms(ids, seed, epoch, (keyed.CUTOUT_TOP, keyed.CUTOUT_LEFT)) * side).astype(np.int64)  # (2, n)
    start = np.clip(middle - size // 2, 0, side)
    stop = np.clip(middle - size // 2 + size, 0, side)
    return np.concatenate([start, stop - start]).T


def cut_box(side: int, share: float, u: float, v: float) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of CutMix's box: (1 - share) of the area around a uniform centre, cut at the edges."""
    half = side * np.sqrt(1 - share) / 2
    middle_row, middle_column = u * side, v * side
    top, bottom = (int(np.clip(round(middle_row + d), 0, side)) for d in (-half, half))
    left, right = (int(np.clip(round(middle_column + d), 0, side)) for d in (-half, half))
    return top, bottom, left, right
