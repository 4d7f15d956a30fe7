"""Shares, memory and warnings, counted by hand or by a real training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcnn.build import Dataset, make_model, open_dataset
from distcnn.config import TrainConfig, from_flat
from distcnn.optim import build_optimizer
from distcnn.plan import Cluster, learning_rates, memory, problems, shares, train_seconds
from distcnn.shapes import activation_bytes
from distcnn.world import World
from tests.support import ROOT, command, python


def config_of(data: Path, **values: Any) -> TrainConfig:
    return from_flat({"data": str(data), "global_batch_size": 32, "tile_size": 4} | values)


def dataset_of(config: TrainConfig) -> Dataset:
    return open_dataset(config, World())


@pytest.mark.parametrize(
    ("nodes", "ranks", "lanes", "idle", "last_step"),
    [
        (1, 1, [8], 0.0, [3]),
        (2, 1, [4, 4], 0.0, [1, 2]),
        (1, 3, [2, 3, 3], 1 / 9, [0, 1, 2]),
        (2, 4, [1] * 8, 0.0, [0, 0, 1, 0, 0, 1, 0, 1]),
    ],
)
def test_shares(stripes_set: Path, nodes: int, ranks: int, lanes: list[int], idle: float, last_step: list[int]) -> None:
    config = config_of(stripes_set)  # 67 images: steps of 32, 32 and 3
    found = shares(config, dataset_of(config), Cluster(nodes, ranks))
    assert (found.steps, found.lanes, found.last_step) == (3, lanes, last_step)
    assert found.idle == pytest.approx(idle)
    size = sum(shard.bytes for shard in dataset_of(config).manifest.split("train").shards)
    assert found.shards == [1] * nodes * ranks and found.node_bytes == [size] * nodes


@pytest.mark.parametrize(
    ("values", "cluster", "said", "fatal"),
    [
        ({}, Cluster(3, 3), "9 processes, but only 8 lanes", True),
        ({}, Cluster(1, 3), "11% of the processes' time is idle", False),
        ({"global_batch_size": 48}, Cluster(1, 4), "3 lanes a process are no power of two", False),
        ({"global_batch_size": 48}, Cluster(1, 6), "6 processes are no power of two", False),
        ({}, Cluster(1, 8), "have no image in the last step", False),
        ({}, Cluster(1, 1), "3 steps an epoch", False),
        ({}, Cluster(1, 2, gpus=2), "tiles of 4 images leave a GPU idle", False),
        ({}, Cluster(1, 1, gpus=2), "1 processes a node on 2 GPUs", False),
        ({"device": "cpu"}, Cluster(1, 2, gpus=2), "the GPUs that the job asks for", False),
    ],
)
def test_what_hurts_is_said(
    stripes_set: Path, values: dict[str, Any], cluster: Cluster, said: str, fatal: bool
) -> None:
    config = config_of(stripes_set, **values)
    found = problems(config, dataset_of(config), cluster)
    assert any(said in problem.text and problem.fatal == fatal for problem in found), found


def test_nothing_is_said_of_what_is_well(digits_set: Path) -> None:
    config = config_of(digits_set)
    for size in (1, 2, 4, 8):
        assert problems(config, dataset_of(config), Cluster(1, size)) == []


@pytest.mark.parametrize("model", ["cnn", "resnet18"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_memory_is_what_a_real_step_holds(stripes_set: Path, model: str, optimizer: str) -> None:
    config = config_of(stripes_set, model=model, optimizer=optimizer, image_size=16, ema_decay=0.9)
    dataset = dataset_of(config)
    found = memory(config, dataset, lanes=1)
    real = make_model(config, dataset).train()
    step = build_optimizer(config.optim, real)
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*real.parameters(), *real.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real(torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)).sum()
    assert found.activations == pytest.approx(sum(kept.values()), rel=0.05)
    loss.backward()
    step.step()
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    states = [t for state in step.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    assert (found.gradients, found.optimizer) == (gradients, sum(t.nbytes for t in states))
    assert found.parameters == found.averaged == sum(t.nbytes for t in (*real.parameters(), *real.buffers()))
    assert found.total == sum((found.parameters, found.gradients, found.optimizer, found.averaged, found.activations))


def test_half_precision_halves_the_activations_of_floats(stripes_set: Path) -> None:
    config = config_of(stripes_set)
    with torch.device("meta"):
        model = make_model(config, dataset_of(config))
    whole, half = (activation_bytes(model, 8, 8, half) for half in (False, True))
    assert whole / 2 <= half < 0.7 * whole  # the places of max pooling are integers


def test_time_follows_the_rank_with_most_lanes(stripes_set: Path) -> None:
    config = config_of(stripes_set, epochs=10)
    dataset = dataset_of(config)
    times = [train_seconds(config, dataset, Cluster(1, size), 100.0) for size in (1, 2, 3, 8)]
    assert times == [pytest.approx(10 * 3 * lanes * 4 / 100) for lanes in (8, 4, 3, 1)]


def test_the_curve_begins_and_ends_where_the_schedule_does(stripes_set: Path) -> None:
    config = config_of(stripes_set, epochs=10, warmup_epochs=1.0, lr=0.3)
    points = learning_rates(config, 3, 100)
    assert [step for step, _ in points] == list(range(30))
    assert points[0][1] == pytest.approx(0.1) and max(rate for _, rate in points) == pytest.approx(0.3)
    assert points[-1][1] < 0.01
    assert len(learning_rates(config, 3, 5)) == 5


def test_the_command_prints_it_all_and_fails_for_what_cannot_run(digits_set: Path, tmp_path: Path) -> None:
    words = ("--data", digits_set, "--nodes", "2", "--gpus-per-node", "2", "--images-per-second", "1000")
    curve = tmp_path / "curve.png"
    done = command(python("-m", "distcnn", "plan", *words, "--time", "1", "--curve", curve), ROOT)
    assert done.code == 0, done.err
    for part in (
        "1,438 images",
        "23 steps an epoch",
        "4 = 2 nodes x 2, 2 lanes each",
        "memory     about",
        "time  ",
    ):
        assert part in done.out, done.out
    assert curve.read_bytes().startswith(b"\x89PNG")
    done = command(python("-m", "distcnn", "plan", "--data", digits_set, "--nodes", "9"), ROOT)
    assert done.code == 1 and "cannot run: 9 processes" in done.out
    assert command(python("-m", "distcnn", "plan", "--nodes", "0"), ROOT).errors == [
        "distcnn plan: error: --nodes 0: at least 1"
    ]


def test_a_probe_measures_something(stripes_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distcnn import probe

    monkeypatch.setattr(probe, "SECONDS", 0.1)
    config = config_of(stripes_set)
    speed = probe.images_per_second(config, dataset_of(config))
    assert np.isfinite(speed) and speed > 1
