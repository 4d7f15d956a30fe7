# N images, H W pixels, k side of a patch, D = 3 k k
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distcnn.build import make_loader, open_dataset
from distcnn.config import from_flat
from distcnn.models import build_model
from distcnn.whitening import PatchSums, whitening_filters, whitening_weight
from distcnn.world import World

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(n: int, side: int) -> np.ndarray:
    """(n, side, side, 3) uint8, smooth enough for neighbours to be alike."""
    rough = np.random.default_rng(0).integers(0, 256, (n, side, side, 3)).astype(np.float64)
    return ((rough + np.roll(rough, 1, 1) + np.roll(rough, 1, 2)) / 3).astype(np.uint8)


def patches(images_NHWC: np.ndarray, k: int, step: int) -> np.ndarray:
    """(P, D) float64 normalised, by plain loops, in the order of a filter's weights."""
    x = ((images_NHWC / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    side = x.shape[-1]
    places = [(i, j) for i in range(0, side - k + 1, step) for j in range(0, side - k + 1, step)]
    return np.stack([image[:, i : i + k, j : j + k].reshape(-1) for image in x for i, j in places])


@pytest.mark.parametrize(("k", "step", "side"), [(2, 1, 7), (4, 2, 12), (3, 3, 8)])
def test_moments_are_those_of_the_patches(k: int, step: int, side: int) -> None:
    sums = PatchSums(k, step)
    pixels = images(9, side)
    for start in (0, 2, 3):  # in parts of different sizes
        sums.add(pixels[start : {0: 2, 2: 3, 3: 9}[start]])
    flat = patches(pixels, k, step)
    assert sums.patches == len(flat)
    assert np.allclose(sums.moments(MEAN, STD), flat.T @ flat / len(flat), rtol=1e-9)


def test_what_the_layer_gives_is_white() -> None:
    """Moments of the outputs of the first half: 1 on the diagonal (a little less for weak patterns), 0 beside it."""
    sums = PatchSums(2)
    sums.add(images(64, 16))
    filters = whitening_filters(sums.moments(MEAN, STD), 24)
    outputs = patches(images(64, 16), 2, 1) @ filters[:12].T
    moments = outputs.T @ outputs / len(outputs)
    assert np.allclose(np.diag(moments), 1, atol=0.05) and np.abs(moments - np.diag(np.diag(moments))).max() < 1e-9
    assert np.array_equal(filters[12:], -filters[:12])
    assert (filters[:12].max(1) == np.abs(filters[:12]).max(1)).all(), "signs do not depend on the solver"


def test_the_order_of_the_images_does_not_matter() -> None:
    pixels = images(32, 9)
    one, other = PatchSums(2), PatchSums(2)
    one.add(pixels)
    for image in pixels[::-1]:
        other.add(image[None])
    assert np.array_equal(one.moments(MEAN, STD), other.moments(MEAN, STD))


def test_weights_from_a_data_set(stripes_set: Path) -> None:
    config = from_flat({"data": str(stripes_set), "model": "airbench", "image_size": 16})
    dataset = open_dataset(config, World())
    model = build_model(config.model, 5, 16, seed=0)
    found = []
    for threads in (1, 3):
        loader = make_loader(config, dataset, "train", False, threads, False)
        found.append(whitening_weight(loader, model.whiten, dataset.mean, dataset.std))
        loader.close()
    assert found[0].shape == model.whiten.weight.shape and found[0].dtype == torch.float32
    assert torch.equal(found[0], found[1]) and found[0].isfinite().all()
