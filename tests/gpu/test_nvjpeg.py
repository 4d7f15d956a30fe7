"""--decode nvjpeg: nearly the CPU's pixels, and runs that equal themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distcnn.build import make_loader, make_training_loader, open_dataset
from distcnn.cli import main
from distcnn.config import TrainConfig
from distcnn.data.loader import Loader, Tile, training_requests
from distcnn.data.order import EpochOrder
from distcnn.data.upload import CPU
from distcnn.world import World
from tests.gpu.support import DEVICE, begin, begin_and_die, gpu_config, run
from tests.harness import trace_of
from tests.support import stripes

SIZES = ((24, 24), (40, 30), (25, 90), (120, 160))  # height, width


@pytest.fixture(scope="module")
def jpeg_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 training and 20 validation JPEG files of several sizes, some of them progressive or gray."""
    folder, noise = tmp_path_factory.mktemp("jpeg"), np.random.default_rng(7)
    for number in range(64):
        label, (height, width) = number % 4, SIZES[number // 4 % 4]
        image = Image.fromarray(stripes(label, 160, noise)).resize((width, height))
        place = folder / "files" / ("train" if number < 44 else "val") / str(label) / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.convert("L" if number % 11 == 3 else "RGB").save(place, quality=92, progressive=number % 7 == 2)
    assert main(["prepare", "folder", str(folder / "files"), "--output", str(folder / "set"), "--workers", "1"]) == 0
    return folder / "set"


def epoch_of(loader: Loader, config: TrainConfig) -> list[Tile]:
    """The tiles of the first epoch, on the host."""
    order = EpochOrder(loader.reader.counts, config.geometry, config.run.seed, 0)
    seen = []
    for tiles in loader.steps(training_requests(order, range(config.geometry.lanes))):
        torch.cuda._sleep(20_000_000)  # the decoder's memory is used again while the device is behind
        seen += [Tile(t.request, t.images.clone(), t.labels.clone(), t.weights.clone()) for t in tiles]
    loader.close()
    return [Tile(t.request, t.images.cpu(), t.labels.cpu(), t.weights.cpu()) for t in seen]


@pytest.mark.parametrize("image_size", [12, 24])
def test_images_are_nearly_the_cpus(image_size: int, jpeg_set: Path, tmp_path: Path) -> None:
    config = gpu_config(jpeg_set, tmp_path / "run", image_size=image_size, crop="auto", decode="nvjpeg")
    dataset = open_dataset(config, World())
    made = epoch_of(make_training_loader(config, dataset, World(), 2, torch.device(DEVICE)), config)
    expected = epoch_of(make_loader(config, dataset, "train", True, 1, False, CPU), config)
    assert len(made) == len(expected) == 16
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.weights, other.weights)
        if len(one.labels):
            assert (one.images.int() - other.images.int()).abs().float().mean() < 4


def test_a_run_equals_itself_and_goes_on(jpeg_set: Path, tmp_path: Path) -> None:
    values = {"decode": "nvjpeg", "image_size": 24, "crop": "auto", "checkpoint_every": 1}
    whole = run(jpeg_set, tmp_path / "whole", **values)
    config = gpu_config(jpeg_set, tmp_path / "cut", **values)
    begin_and_die(config, 5)
    begin(config)
    assert trace_of(tmp_path / "cut") == whole
