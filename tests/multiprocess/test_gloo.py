"""The same run from 1, 2 and 4 real processes, and what becomes of other numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distcnn import checkpoint
from distcnn.config import TrainConfig, to_toml
from distcnn.train import train
from distcnn.world import World
from tests.harness import Trace, small_config, trace_of
from tests.support import command, torchrun

WORKER = Path(__file__).with_name("worker.py")
# The hidden layer makes the gradients longer than DDP's first bucket (1 MiB), the convolutions lie in channels_last.
BIG: dict[str, Any] = {"hidden": 20_000, "checkpoint_every": 1, "epochs": 1}
TWELVE: dict[str, Any] = {"global_batch_size": 48, "epochs": 1}
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "warmup_epochs": 0.0, "checkpoint_every": 1, "epochs": 1}


def alone(config: TrainConfig) -> Path:
    train(config, World())
    return config.output


def together(processes: int, configs: dict[str, TrainConfig], folder: Path) -> None:
    """Run the configs in `processes` processes, one after the other."""
    files = []
    for name, config in configs.items():
        files.append(folder / f"{name}.toml")
        files[-1].write_text(to_toml(config))
    done = command(torchrun(processes, WORKER, *files), folder, seconds=240)
    assert done.code == 0, done.err[-4000:]
    assert done.err.count("done\n") == processes, done.err[-4000:]


def trace(run: Path) -> Trace:
    found = trace_of(run)
    assert [row["exactly_once"] for row in found.ledger] == [True] * len(found.ledger) and found.ledger
    return found


def saved_weights(run: Path, step: int) -> torch.Tensor:
    """All weights after a step, as one vector."""
    model = checkpoint.load(run / "checkpoints" / f"step_{step:08d}").model
    return torch.cat([model[name].flatten().double() for name in sorted(model)])


def test_two_processes(stripes_set: Path, tmp_path: Path) -> None:
    configs = {
        "tree": small_config(stripes_set, tmp_path / "tree2", **BIG),
        "sums": small_config(stripes_set, tmp_path / "sums2", **SGD),
        "ddp": small_config(stripes_set, tmp_path / "ddp2", reduction="ddp", **SGD),
    }
    together(2, configs, tmp_path)
    assert trace(tmp_path / "tree2") == trace(alone(small_config(stripes_set, tmp_path / "tree1", **BIG)))
    one = trace(alone(small_config(stripes_set, tmp_path / "sums1", **SGD)))
    assert trace(tmp_path / "sums2") == one
    ddp = trace(tmp_path / "ddp2")
    assert ddp.ledger == one.ledger and [row["step"] for row in ddp.metrics] == [row["step"] for row in one.metrics]
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        assert ddp.metrics[0][name] == pytest.approx(one.metrics[0][name], rel=1e-6), name
    expected, found = saved_weights(tmp_path / "sums1", 1), saved_weights(tmp_path / "ddp2", 1)
    assert (found - expected).norm() <= 1e-6 * expected.norm(), "one step later, up to the order of the sums"
    assert json.loads((tmp_path / "tree2" / "results.json").read_text())["world_size"] == 2


def test_four_processes(stripes_set: Path, tmp_path: Path) -> None:
    together(4, {"tree": small_config(stripes_set, tmp_path / "tree4", **BIG)}, tmp_path)
    assert trace(tmp_path / "tree4") == trace(alone(small_config(stripes_set, tmp_path / "tree1", **BIG)))


def test_three_processes(stripes_set: Path, tmp_path: Path) -> None:
    """12 lanes are three subtrees: the same bits. 8 lanes are not: every sample once all the same. 2 lanes: refused."""
    configs = {
        "twelve": small_config(stripes_set, tmp_path / "twelve3", **TWELVE),
        "eight": small_config(stripes_set, tmp_path / "eight3", epochs=1),
        "two": small_config(stripes_set, tmp_path / "two3", global_batch_size=8),
    }
    together(3, configs, tmp_path)
    assert trace(tmp_path / "twelve3") == trace(alone(small_config(stripes_set, tmp_path / "twelve1", **TWELVE)))
    one = trace(alone(small_config(stripes_set, tmp_path / "eight1", epochs=1)))
    eight = trace(tmp_path / "eight3")
    assert eight.ledger == one.ledger and eight.metrics[-1]["val/samples"] == 37
    assert eight.metrics[0]["train/loss"] == pytest.approx(one.metrics[0]["train/loss"], rel=1e-5)
    said = {(tmp_path / f"two.error{rank}").read_text() for rank in range(3)}
    assert said == {
        "3 processes, but only 2 lanes (global batch 8 / tile 4): use at most 2 processes, a larger global batch or a"
        " smaller tile"
    }
    assert not (tmp_path / "two3").exists()


REFUSED = """
import pathlib, sys
from distcnn.cli import main
from distcnn.world import read_world
codes = [main(["train", "--epohcs", "3"]), "torch" in sys.modules, main(["train", *sys.argv[1:]])]
pathlib.Path(f"rank{read_world().rank}").write_text(str(codes))
"""


def test_what_is_wrong_is_said_by_rank_0_alone_and_nothing_is_begun(stripes_set: Path, tmp_path: Path) -> None:
    """A flag that is none, before torch is imported; then more processes than lanes."""
    (tmp_path / "refused.py").write_text(REFUSED)
    words = [
        "--data",
        stripes_set,
        "--output",
        "run",
        "--global-batch-size",
        "8",
        "--tile-size",
        "8",
        "--device",
        "cpu",
    ]
    done = command(torchrun(2, "refused.py", *words), tmp_path)
    assert done.errors == [
        "distcnn train: error: Unrecognized options: --epohcs, 3; perhaps you meant: --epochs INT",
        "distcnn train: error: 2 processes, but only 1 lanes (global batch 8 / tile 8): use at most 1 processes, a"
        " larger global batch or a smaller tile",
    ], done.err
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["[2, False, 2]"] * 2
    assert not (tmp_path / "run").exists()
