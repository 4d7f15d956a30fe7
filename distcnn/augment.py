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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Targets:
    """What a tile should come out as: `share` of the loss against labels, the rest against the partners' labels."""

    labels: torch.Tensor  # (n,) int64
    partner_labels: torch.Tensor  # (n,) int64
    share: float
    weights: torch.Tensor  # (n,) float32


@dataclass(frozen=True)
class Augment:
    """What is done to a training tile. With `train=False` images are only normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    padding: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, tile: Tile, device: torch.device, train: bool) -> tuple[torch.Tensor, Targets]:
        """(n, 3, S, S) float32 in channels_last, and its Targets, on `device`."""
        images_NHWC = tile.images.to(device, non_blocking=True)
        labels = tile.labels.to(device, non_blocking=True)
        weights = tile.weights.to(device, non_blocking=True)
        targets = Targets(labels, labels, 1.0, weights)
        epoch, ids = tile.request.epoch, tile.request.ids
        if train and (self.padding or self.flip):
            images_NHWC = self._shift_and_flip(images_NHWC, ids, epoch)
        x_NCHW = self.normalise(images_NHWC)
        if train and (self.mixup or self.cutmix) and len(ids) > 1:
            return self._mix(x_NCHW, targets, epoch, keyed.tile_key(tile.request.step, tile.request.lane))
        return x_NCHW, targets

    def normalise(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """(n, 3, S, S) float32, zero mean and unit variance by `mean` and `std`, channels_last without a copy."""
        mean = torch.tensor([255 * m for m in self.mean], device=images_NHWC.device)
        inverse = torch.tensor([1 / (255 * s) for s in self.std], device=images_NHWC.device)
        return images_NHWC.to(torch.float32).sub_(mean).mul_(inverse).permute(0, 3, 1, 2)

    def _shift_and_flip(self, images_NHWC: torch.Tensor, ids: Ids, epoch: int) -> torch.Tensor:
        """Crops of the zero-padded images, some mirrored, in one gather."""
        n, side = images_NHWC.shape[:2]
        top = self._offsets(ids, epoch, keyed.CROP_TOP)
        left = self._offsets(ids, epoch, keyed.CROP_LEFT)
        flipped = np.zeros(n, dtype=bool)
        if self.flip:
            flipped = keyed.uniform(ids, self.seed, epoch, keyed.FLIP) < 0.5
        ramp = np.arange(side)
        rows_NH = ramp[None, :] + top[:, None]
        columns_NW = np.where(flipped[:, None], ramp[::-1][None, :], ramp[None, :]) + left[:, None]
        outside = (rows_NH < 0) | (rows_NH >= side), (columns_NW < 0) | (columns_NW >= side)
        device = images_NHWC.device
        rows = torch.from_numpy(rows_NH.clip(0, side - 1)).to(device)
        columns = torch.from_numpy(columns_NW.clip(0, side - 1)).to(device)
        picked = images_NHWC[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
        if self.padding:
            blank = torch.from_numpy(outside[0][:, :, None] | outside[1][:, None, :]).to(device)
            picked.masked_fill_(blank[..., None], 0)
        return picked

    def _offsets(self, ids: Ids, epoch: int, operation: int) -> NDArray[np.int64]:
        """(n,) int64, uniform in -padding .. padding."""
        draws = keyed.uniform(ids, self.seed, epoch, operation)
        return np.floor(draws * (2 * self.padding + 1)).astype(np.int64) - self.padding

    def _mix(self, x_NCHW: torch.Tensor, targets: Targets, epoch: int, key: int) -> tuple[torch.Tensor, Targets]:
        """MixUp (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019) with partners of the same tile."""
        floats = keyed.stream(key, self.seed, epoch, keyed.MIX_KIND)
        kind: Literal["mixup", "cutmix"] = "mixup" if self.mixup else "cutmix"
        if self.mixup and self.cutmix:
            kind = "mixup" if next(floats) < 0.5 else "cutmix"
        share = keyed.beta(self.mixup if kind == "mixup" else self.cutmix, floats)
        ranks = keyed.words(np.arange(len(x_NCHW)) + (key << 16), self.seed, epoch, keyed.MIX_PARTNER)
        partner = torch.from_numpy(np.argsort(ranks, kind="stable")).to(x_NCHW.device)
        if kind == "mixup":
            mixed = x_NCHW * share + x_NCHW[partner] * (1 - share)
        else:
            top, bottom, left, right = cut_box(x_NCHW.shape[-1], share, next(floats), next(floats))
            mixed = x_NCHW.clone(memory_format=torch.channels_last)
            mixed[:, :, top:bottom, left:right] = x_NCHW[partner, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / x_NCHW.shape[-1] ** 2
        weights = targets.weights * targets.weights[partner]
        return mixed, Targets(targets.labels, targets.labels[partner], share, weights)


def cut_box(side: int, share: float, u: float, v: float) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of CutMix's box: (1 - share) of the area around a uniform centre, cut at the edges."""
    half = side * np.sqrt(1 - share) / 2
    middle_row, middle_column = u * side, v * side
    top, bottom = (int(np.clip(round(middle_row + d), 0, side)) for d in (-half, half))
    left, right = (int(np.clip(round(middle_column + d), 0, side)) for d in (-half, half))
    return top, bottom, left, right
