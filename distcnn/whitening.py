"""A first layer that whitens: its filters are the principal patterns of patches of training images, scaled alike.

Jordan, arXiv 2404.00498, section 3.1, after Page, "How to train your ResNet 8", 2019. The sums over pixels are
integers, and what follows is float64, so the filters do not depend on the order of the images, threads or processes.

N images, H W pixels, k side of a patch, D = 3 k k values of a patch, F filters.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distcnn.data.loader import Loader, TileRequest

IMAGES = 4096  # of the training split, evenly spaced: 1,000 would do for patches of 2x2
EPSILON = 5e-4  # added to the variances, as in the paper's code
BATCH = 64


class PatchSums:
    """Exact sums over patches of side `k`, `step` pixels apart, of uint8 images: number, values, products of two."""

    def __init__(self, k: int, step: int = 1) -> None:
        self.k, self.step, self.patches = k, step, 0
        d = 3 * k * k
        self.values = np.zeros(d, dtype=np.int64)
        self.products = np.zeros((d, d), dtype=np.int64)

    def add(self, images_NHWC: NDArray[np.uint8]) -> None:
        """Count the patches of (n, H, W, 3) images."""
        windows = np.lib.stride_tricks.sliding_window_view(images_NHWC, (self.k, self.k), axis=(1, 2))
        windows = windows[:, :: self.step, :: self.step]
        # n y x 3 k k -> patches D, values in the order of a filter's weights: C k k
        flat = windows.reshape(-1, 3 * self.k * self.k).astype(np.float64)
        self.patches += len(flat)
        self.values += flat.sum(0).astype(np.int64)
        self.products += (flat.T @ flat).astype(np.int64)  # integers below 2^53 are exact in float64, in any order

    def moments(self, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float64]:
        """(D, D) float64: the mean product of two values of a patch, of pixels normalised as (x / 255 - mean) / std."""
        per_value = self.k * self.k
        shift = 255 * np.repeat(np.array(mean, dtype=np.float64), per_value)
        scale = 1 / (255 * np.repeat(np.array(std, dtype=np.float64), per_value))
        first, second = self.values / self.patches, self.products / self.patches
        shifted = second - np.outer(first, shift) - np.outer(shift, first) + np.outer(shift, shift)
        moments: NDArray[np.float64] = shifted * np.outer(scale, scale)
        return moments


def whitening_filters(moments_DD: NDArray[np.float64], filters: int) -> NDArray[np.float64]:
    """(filters, D): the strongest patterns, largest variance first, each followed in the second half by its negative.

    A pattern is an eigenvector of the moments over the root of its variance; its largest value is positive.
    """
    variances, vectors = np.linalg.eigh(moments_DD)
    strongest = np.argsort(-variances, kind="stable")[: filters // 2]
    patterns = vectors.T[strongest]
    largest = np.abs(patterns).argmax(1)
    signs = np.sign(patterns[np.arange(len(patterns)), largest])
    patterns = patterns * (signs / np.sqrt(np.maximum(variances[strongest], 0) + EPSILON))[:, None]
    return np.concatenate([patterns, -patterns])


def whitening_weight(loader: Loader, layer: nn.Conv2d, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """The weights of `layer`, (F, 3, k, k) float32, from evenly spaced samples of a loader without augmentation.

    Samples that cannot be read count for nothing.
    """
    sums = PatchSums(layer.kernel_size[0], layer.stride[0])
    ids = np.unique(np.linspace(0, len(loader.reader) - 1, IMAGES).round().astype(np.int64))
    requests = ([TileRequest(0, number, 0, part)] for number, part in enumerate(_parts(ids)))
    for (tile,) in loader.steps(requests):
        sums.add(tile.images[tile.weights > 0].numpy())
    weight = whitening_filters(sums.moments(mean, std), layer.out_channels)
    return torch.from_numpy(weight.reshape(layer.weight.shape)).to(torch.float32)


def _parts(ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
