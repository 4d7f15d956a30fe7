"""Decoded pixels kept in memory: a small set is decoded once, in its first epoch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from distcnn.data.decode import Pixels
from distcnn.data.order import SAMPLES, Ids, sample_of


class PixelCache:
    """The pixels of samples of one size, (N, H, W, 3) uint8, filled as samples are decoded. Safe to use from threads.

    Memory is taken as it is filled. An image of another size is not kept.
    """

    def __init__(self, samples: int, height: int, width: int) -> None:
        self._pixels = np.empty((samples, height, width, 3), dtype=np.uint8)
        self._filled = np.zeros(samples, dtype=bool)
        self._flat = torch.from_numpy(self._pixels).view(samples, -1)  # (N, H * W * 3)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, 3) of an image."""
        return self._pixels.shape[1:]

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """(n,) bool: which of the samples are kept."""
        return self._filled[sample_of(ids)]

    def get(self, sample: int) -> Pixels:
        """(H, W, 3) uint8, not to be written to."""
        pixels: Pixels = self._pixels[sample % SAMPLES]
        return pixels

    def take(self, ids: Ids, out: Pixels) -> None:
        """Copy the pixels of samples that are kept into `out` (n, H, W, 3)."""
        if not len(ids):  # a rank with nothing to do in a ragged step
            return
        target = torch.from_numpy(out).view(len(ids), -1)
        torch.index_select(self._flat, 0, torch.from_numpy(sample_of(ids)), out=target)

    def put(self, sample: int, pixels: Pixels) -> None:
        """Keep the pixels (H, W, 3) of a sample, if they have the size."""
        if pixels.shape == self.shape:
            sample %= SAMPLES
            self._pixels[sample] = pixels
            self._filled[sample] = True  # last: whoever sees it sees the pixels
