from __future__ import annotations

import numpy as np
import pytest

from distcnn.data.manifest import ImageStats
from distcnn.data.prepare.stats import GRID, Sums, is_gray


def images(*shapes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def summed(batch: list[np.ndarray]) -> Sums:
    sums = Sums()
    for image in batch:
        sums.add(image)
    sums.settle()
    return sums


@pytest.mark.parametrize(
    "shapes", [[(1, 1)], [(8, 8)] * 5, [(32, 32)] * 300, [(3, 5), (32, 1), (7, 31)], [(32, 32)] * 9 + [(1, 2)]]
)
def test_mean_and_std_are_exact_up_to_32_pixels(shapes: list[tuple[int, int]]) -> None:
    batch = images(*shapes)
    sums = summed(batch)
    flat = np.concatenate([image.reshape(-1, 3) for image in batch]).astype(np.float64) / 255
    stats = sums.stats()
    assert sums.pixels == len(flat)
    assert np.allclose(stats.mean, flat.mean(axis=0), atol=1e-6)
    assert np.allclose(stats.std, flat.std(axis=0), atol=1e-6)
    assert (stats.min_height, stats.max_height) == (min(s[0] for s in shapes), max(s[0] for s in shapes))
    assert (stats.min_width, stats.max_width) == (min(s[1] for s in shapes), max(s[1] for s in shapes))


def test_the_brightest_images_do_not_overflow() -> None:
    sums = summed([np.full((32, 32, 3), 255, dtype=np.uint8)] * 500)
    assert sums.total == [500 * 1024 * 255] * 3
    assert sums.squares == [500 * 1024 * 255**2] * 3
    assert sums.stats().mean == (1.0, 1.0, 1.0)
    assert sums.stats().std == (0.0, 0.0, 0.0)


def test_larger_images_are_sampled_evenly() -> None:
    ramp = np.repeat(np.linspace(0, 255, 400).astype(np.uint8)[:, None, None], 300, axis=1).repeat(3, axis=2)
    sums = summed([ramp])
    assert 0 < sums.pixels <= GRID * GRID
    assert abs(sums.stats().mean[0] - ramp.mean() / 255) < 0.02
    assert abs(sums.stats().std[0] - ramp.std() / 255) < 0.02


def test_any_partition_gives_the_same_sums() -> None:
    batch = images(*[(9, 7), (40, 20), (32, 32), (5, 5)] * 3)
    parts = Sums()
    for start, stop in ((7, 12), (0, 1), (1, 7), (3, 3)):
        parts.merge(summed(batch[start:stop]))
    assert summed(batch) == parts


@pytest.mark.parametrize(("colour", "gray"), [((5, 5, 5), True), ((5, 6, 5), False), ((5, 5, 6), False)])
def test_gray_means_three_equal_channels(colour: tuple[int, int, int], gray: bool) -> None:
    image = np.full((4, 4, 3), 9, dtype=np.uint8)
    image[3, 2] = colour
    assert is_gray(image) is gray
    sums = summed([np.zeros((2, 2, 3), dtype=np.uint8), image])
    assert sums.stats().grayscale is gray


def test_no_image_no_statistics() -> None:
    sums = summed([])
    sums.merge(Sums())
    assert sums.stats() == ImageStats()
