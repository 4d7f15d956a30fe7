"""Statistics of images as sums: sizes, and per channel how bright they are. Integers, so any order gives the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from distcnn.data.decode import Pixels
from distcnn.data.manifest import ImageStats

HOLD = 128  # samples summed together
GRID = 32  # pixels of an image that count in mean and std: all up to 32x32, else about 32 rows by 32 columns


@dataclass
class Sums:
    """Over images added so far. `total` and `squares` (3,) are of R, G, B in 0..255 over `pixels` pixels."""

    pixels: int = 0
    total: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    min_width: int = 0
    max_width: int = 0
    min_height: int = 0
    max_height: int = 0
    gray: bool = True
    _shape: tuple[int, ...] = field(default=(), compare=False)  # of the image added last
    _held: Pixels | None = field(default=None, compare=False)  # memory for samples to be summed many at a time
    _values: int = field(default=0, compare=False)  # of it that are in use

    def add(self, image: Pixels) -> None:
        """Count an image (H, W, 3) uint8 in. Not the image is kept for it, but its sample."""
        if image.shape != self._shape:
            self._shape = image.shape
            height, width = image.shape[:2]
            self._add_sizes(width, width, height, height)
        self.gray = self.gray and is_gray(image)
        grid = _grid(image)
        self.pixels += grid.shape[0] * grid.shape[1]
        if self._held is None or self._values + grid.size > len(self._held):
            self.settle()
            self._held = np.empty(HOLD * GRID * GRID * 3, dtype=np.uint8)
        self._held[self._values : self._values + grid.size] = grid.reshape(-1)  # r g b r g b ...
        self._values += grid.size

    def settle(self) -> None:
        """Add up the samples held back, and let their memory go."""
        if self._held is not None:
            self._add_sums(*_channel_sums(self._held[: self._values]))
            self._held, self._values = None, 0

    def merge(self, other: Sums) -> None:
        """Count in what `other` has counted."""
        other.settle()
        if not other.pixels:
            return
        self._add_sizes(other.min_width, other.max_width, other.min_height, other.max_height)
        self.gray = self.gray and other.gray
        self.pixels += other.pixels
        self._add_sums(other.total, other.squares)

    def stats(self) -> ImageStats:
        """As the manifest has it: mean and std in [0, 1], 6 digits."""
        self.settle()
        if not self.pixels:
            return ImageStats()
        mean = [total / self.pixels for total in self.total]
        var = [squares / self.pixels - m * m for squares, m in zip(self.squares, mean, strict=True)]
        return ImageStats(
            min_width=self.min_width,
            max_width=self.max_width,
            min_height=self.min_height,
            max_height=self.max_height,
            mean=tuple(round(m / 255, 6) for m in mean),
            std=tuple(round(max(v, 0.0) ** 0.5 / 255, 6) for v in var),
            grayscale=self.gray,
        )

    def _add_sizes(self, min_width: int, max_width: int, min_height: int, max_height: int) -> None:
        first = self.pixels == 0
        self.min_width = min_width if first else min(self.min_width, min_width)
        self.min_height = min_height if first else min(self.min_height, min_height)
        self.max_width = max(self.max_width, max_width)
        self.max_height = max(self.max_height, max_height)

    def _add_sums(self, total: list[int], squares: list[int]) -> None:
        self.total = [a + b for a, b in zip(self.total, total, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, squares, strict=True)]


ROWS, WIDTH = 256, 96  # 256 squares of 255 stay under 2**24, so float32 adds them exactly, 8 times as fast as integers
_ONES = np.ones((1, ROWS), dtype=np.float32)


def _channel_sums(values: NDArray[np.uint8]) -> tuple[list[int], list[int]]:
    """Exact sums and sums of squares of the R, G and B in `values` (3 n,)."""
    padded = np.zeros(-(-len(values) // (ROWS * WIDTH)) * ROWS * WIDTH, dtype=np.float32)
    padded[: len(values)] = values
    blocks = padded.reshape(-1, ROWS, WIDTH)
    total = _ONES @ blocks
    np.square(padded, out=padded)
    squares = _ONES @ blocks
    of_channels = [sums.astype(np.int64).reshape(-1, 3).sum(axis=0).tolist() for sums in (total, squares)]
    return of_channels[0], of_channels[1]


def is_gray(image: Pixels) -> bool:
    """Whether the three channels of (H, W, 3) are equal; a few pixels show most colour images."""
    return _equal_channels(_grid(image)) and _equal_channels(image)


def _equal_channels(image: Pixels) -> bool:
    return bool((image[:, :, 0] == image[:, :, 1]).all() and (image[:, :, 1] == image[:, :, 2]).all())


def _grid(image: Pixels) -> Pixels:
    """At most about GRID rows by GRID columns of an image, evenly spread."""
    height, width = image.shape[:2]
    return image if height <= GRID and width <= GRID else image[:: _step(height), :: _step(width)]


def _step(side: int) -> int:
    return -(-side // GRID)
