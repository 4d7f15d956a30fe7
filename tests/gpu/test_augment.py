"""Augmentation on a GPU makes the CPU's pixels: each is a few exactly rounded operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcnn.augment import Augment
from distcnn.data.loader import Tile
from tests.gpu.support import DEVICE
from tests.test_augment import EVERYTHING, PLAIN, make_tile


def on_gpu(tile: Tile) -> Tile:
    return Tile(tile.request, *(part.to(DEVICE) for part in (tile.images, tile.labels, tile.weights)))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}], ids=["", "mixup", "cutmix"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_tile_is_the_cpus(name: str, mixing: dict[str, float]) -> None:
    augment = Augment((0.48, 0.45, 0.4), (0.22, 0.225, 0.23), seed=PLAIN.seed, **{**EVERYTHING[name], **mixing})
    for epoch in (0, 1):
        tile = make_tile(np.arange(40, 64), epoch=epoch)
        cpu, wanted = augment(tile, torch.device("cpu"), train=True)
        gpu, found = augment(on_gpu(tile), torch.device(DEVICE), train=True)
        assert gpu.is_contiguous(memory_format=torch.channels_last) and gpu.device.type == DEVICE
        assert torch.equal(gpu.cpu(), cpu)
        assert torch.equal(found.labels.cpu(), wanted.labels) and found.share == wanted.share
        assert torch.equal(found.partner_labels.cpu(), wanted.partner_labels)


def test_without_training_too() -> None:
    tile = make_tile(np.arange(9))
    augment = Augment((0.48, 0.45, 0.4), (0.22, 0.225, 0.23), seed=1)
    cpu, _ = augment(tile, torch.device("cpu"), train=False)
    gpu, _ = augment(on_gpu(tile), torch.device(DEVICE), train=False)
    assert torch.equal(gpu.cpu(), cpu)
