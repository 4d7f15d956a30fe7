"""Pinned buffers and the side stream: the pixels of the CPU's way, copied while the device computes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from distcnn.build import make_loader, open_dataset
from distcnn.config import TrainConfig
from distcnn.data.loader import Tile, training_requests
from distcnn.data.order import EpochOrder
from distcnn.data.upload import CPU, Upload
from distcnn.world import World
from tests.gpu.support import DEVICE, gpu_config

GPU = torch.device(DEVICE)
LONG = 200_000_000  # clock cycles that a kernel sleeps: a tenth of a second or so


def epoch_of(config: TrainConfig, device: torch.device, busy: bool) -> list[Tile]:
    """An epoch's tiles, brought to the host. `busy`: the device computes for long before each step looks at its own."""
    dataset = open_dataset(config, World())
    loader = make_loader(config, dataset, "train", True, 2, ahead=True, device=device)
    order = EpochOrder(loader.reader.counts, config.geometry, config.run.seed, 0)
    seen = []
    for tiles in loader.steps(training_requests(order, range(config.geometry.lanes))):
        if busy:
            torch.cuda._sleep(LONG)
        assert all(part.device.type == device.type for t in tiles for part in (t.images, t.labels, t.weights))
        # A copy on the device, in the order of the computation; brought home when all steps have been asked for.
        seen += [Tile(t.request, t.images.clone(), t.labels.clone(), t.weights.clone()) for t in tiles]
        del tiles  # their memory may be used again from here on
    loader.close()
    return [Tile(t.request, t.images.cpu(), t.labels.cpu(), t.weights.cpu()) for t in seen]


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("image_size", [0, 24])
def test_the_pixels_are_those_of_the_cpu(image_size: int, busy: bool, stripes_set: Path, tmp_path: Path) -> None:
    """Buffers are filled again and memory is given to the next step while the device is far behind."""
    config = gpu_config(stripes_set, tmp_path / "run", image_size=image_size, crop="auto", cache="off")
    gpu, cpu = epoch_of(config, GPU, busy), epoch_of(config, CPU, False)
    assert len(gpu) == len(cpu) == 24
    for one, other in zip(gpu, cpu, strict=True):
        assert np.array_equal(one.request.ids, other.request.ids)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.weights, other.weights)


def test_buffers_are_pinned_and_copies_pass_by_the_computation() -> None:
    upload = Upload(GPU, 2)
    buffer = upload.buffer(64, 32)
    assert buffer.images.is_pinned()
    buffer.pixels[:] = 9
    for _ in range(3):  # memory that is taken now need not be taken below
        upload.send(buffer, torch.arange(64))
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * LONG)
    images, labels = upload.send(buffer, torch.arange(64))
    buffer.copied.synchronize()
    assert not torch.cuda.current_stream().query(), "the copy is done, and the computation before it is not"
    assert bool((images == 9).all()) and labels.tolist() == list(range(64))


def test_sending_does_not_make_the_host_wait() -> None:
    upload = Upload(GPU, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                images, labels, weights = upload.send(upload.buffer(64, 32), torch.arange(64), torch.ones(64))
                assert images.is_cuda and labels.is_cuda and weights.is_cuda
        finally:
            torch.cuda.set_sync_debug_mode("default")
