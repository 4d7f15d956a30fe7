"""TrivialAugment: each operation is torchvision's, to rounding; the draws are the paper's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import autoaugment as theirs

from distcnn.trivial import BINS, OPERATIONS, draw, trivial_augment

SPACE: dict[str, Any] = theirs.TrivialAugmentWide()._augmentation_space(BINS)


def pictures(n: int = 6, height: int = 40, width: int = 40) -> torch.Tensor:
    """(n, H, W, 3) uint8: smooth colours with some noise, one image flat."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (n, 3, 5, 5)).astype(np.float32))
    images = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    images += torch.from_numpy(rng.normal(0, 6, images.shape).astype(np.float32))
    images[-1] = 77
    return images.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def torchvisions(images: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    made = [
        theirs._apply_op(image.permute(2, 0, 1), name, strength, InterpolationMode.NEAREST, None) for image in images
    ]
    return torch.stack(made).permute(0, 2, 3, 1)


@pytest.mark.parametrize("number", range(1, len(OPERATIONS)), ids=lambda n: OPERATIONS[n][0])
def test_operations_are_torchvisions(number: int) -> None:
    name, apply, largest = OPERATIONS[number]
    assert apply is not None
    magnitudes, signed = SPACE[name]
    images = pictures()
    for level in (0, 1, 3, 10, 17, 30):
        for sign in (1, -1) if signed else (1,):
            mine = apply(images, np.full(len(images), sign * level / (BINS - 1) * largest))
            strength = float(magnitudes[level]) * sign if magnitudes.ndim else 0.0
            difference = (mine.int() - torchvisions(images, name, strength).int()).abs()
            # At a rotation the nearest pixel may be a matter of the last bit.
            assert (difference > 1).float().mean() < (0.004 if name == "Rotate" else 1e-9), (level, sign)


def test_the_operations_and_their_order_are_pinned() -> None:
    assert [name for name, _, _ in OPERATIONS] == list(SPACE)


def test_operations_and_strengths_are_uniform() -> None:
    ids = np.arange(50_000)
    operation, strength = draw(ids, 3, 1)
    counts = np.bincount(operation, minlength=len(OPERATIONS))
    expected = len(ids) / len(OPERATIONS)
    assert ((counts - expected) ** 2 / expected).sum() < 34.5  # 13 degrees of freedom, p = 0.001
    for number, (_, _, largest) in enumerate(OPERATIONS):
        levels = strength[operation == number] / (largest or 1) * (BINS - 1)
        if not largest:
            assert (levels == 0).all()
            continue
        assert np.allclose(levels, np.rint(levels), atol=1e-9)
        sizes = np.bincount(np.abs(np.rint(levels)).astype(int), minlength=BINS)
        assert ((sizes - sizes.mean()) ** 2 / sizes.mean()).sum() < 59.7  # 30 degrees of freedom
        positive = (levels > 0).sum() / (levels != 0).sum()
        assert abs(positive - 0.5) < 4 * 0.5 / (levels != 0).sum() ** 0.5


def test_each_image_gets_its_own_operation() -> None:
    images = pictures(60, 24, 24)
    ids = np.arange(60) + 500
    operation, strength = draw(ids, 0, 2)
    out = trivial_augment(images, ids, 0, 2)
    assert len(set(operation.tolist())) > 10
    for i in range(60):
        name = OPERATIONS[operation[i]][0]
        one = trivial_augment(images[i : i + 1], ids[i : i + 1], 0, 2)
        assert torch.equal(out[i : i + 1], one), name
        if name == "Identity":
            assert torch.equal(out[i], images[i])
        elif name not in ("Rotate", "Posterize", "Solarize"):
            expected = torchvisions(images[i : i + 1], name, float(strength[i]))
            assert (one.int() - expected.int()).abs().max() <= 1, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (5, 2), (8, 13)])
def test_small_and_oblong_images(height: int, width: int) -> None:
    images = pictures(100, height, width)
    out = trivial_augment(images, np.arange(100), 0, 0)
    assert out.shape == images.shape and out.dtype == torch.uint8
