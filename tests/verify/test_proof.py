"""The same run from any number of real processes: a ResNet-18 with batch norm, augmentation, MixUp and ragged steps.

Losses of every step, weights, running statistics and the optimizer's state, to the last bit with the tree reduction.
With DDP's own all-reduce they are equal up to rounding: in float64, little; in float32, training magnifies it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcnn import checkpoint
from distcnn.config import TrainConfig, from_flat
from distcnn.verify.evidence import disagreement, kept
from distcnn.verify.launch import Trace
from distcnn.verify.plan import Run
from distcnn.verify.reference import relative
from tests.support import make_stripes
from tests.verify.runs import make_run, run_many

RESNET: dict[str, Any] = {
    "model": "resnet18",
    "epochs": 2,
    "global_batch_size": 16,
    "tile_size": 2,
    "optimizer": "sgd",
    "lr": 0.05,
    "flip": "random",
    "mixup": 0.4,
    "label_smoothing": 0.1,
}
AVERAGED = RESNET | {"ema_decay": 0.9}
SHORT = RESNET | {"epochs": 1, "reduction": "ddp"}
CNN: dict[str, Any] = {
    "channels": [8, 16],
    "hidden": 0,
    "global_batch_size": 16,
    "tile_size": 2,
    "optimizer": "sgd",
    "lr": 0.1,
    "epochs": 20,
}
STEPS = 2  # of an epoch of the ResNet: 16 and 9 samples
STOPS = (0, 2)  # asked to stop in these steps: in the middle of the first epoch, and of the second
Plan = dict[int, list[tuple[Run, dict[str, Any]]]]


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return state.hexdigest()


def ending(trace: Trace) -> dict[str, Any]:
    """All that a run leaves which must not depend on the processes."""
    path = checkpoint.newest_whole(trace.run.config.output)[0]
    assert path is not None, trace.trouble
    saved = checkpoint.load(path)
    states = saved.trainer["optimizer"]["state"]
    momenta = {f"{key}.{name}": t for key, state in states.items() for name, t in state.items() if torch.is_tensor(t)}
    assert saved.ema is None or momenta
    return {
        "losses": [(row["step"], row["train/loss"], row["train/lr"], row["train/grad_norm"]) for row in trace.metrics],
        "model": digest_of(saved.model),
        "average": digest_of(saved.ema or {}),
        "optimizer": digest_of(momenta),
        "evaluation": trace.results["confusion"],
        "ledger": trace.ledger,
    }


def weights_of(trace: Trace) -> dict[str, torch.Tensor]:
    path = checkpoint.newest_whole(trace.run.config.output)[0]
    assert path is not None, trace.trouble
    return {name: t for name, t in checkpoint.load(path).model.items() if t.is_floating_point()}


def base_config(data: Path) -> TrainConfig:
    return from_flat(
        {
            "data": str(data),
            "device": "cpu",
            "threads": 1,
            "log_every": 1,
            "keep_checkpoints": 1,
            "wandb_mode": "disabled",
            "quiet": True,
        }
    )


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """name -> trace of all runs of this file: name-R, R the processes."""
    data = make_stripes(tmp_path_factory.mktemp("proof") / "stripes", 25, 20, side=8)
    base, folder = base_config(data), tmp_path_factory.mktemp("runs")
    plan: Plan = {size: [] for size in (1, 2, 4, 8)}

    def add(name: str, size: int, changes: dict[str, Any], keep: tuple[int, ...] = (0,), **special: Any) -> None:
        output = changes.get("output", str(folder / "runs" / f"{name}-{size}"))
        run = make_run(folder, f"{name}-{size}", size, base, keep, **{**changes, "output": output})
        plan[size].append((run, special))

    for size in (1, 2, 4, 8):
        add("float32", size, AVERAGED)
    for size in (1, 2, 4):
        add("bf16", size, RESNET | {"mixed_precision": "bf16"})
        add("ddp", size, SHORT)
        add("ddp64", size, CNN | {"reduction": "ddp"}, float64=True)
    add("tree-again", 2, AVERAGED)
    add("ddp-again", 2, SHORT)
    for size, stop in ((4, STOPS[0]), (1, STOPS[1]), (2, -1)):
        add("moved", size, AVERAGED | {"output": str(folder / "runs" / "moved")}, stop_at=stop)
    traces: dict[str, Trace] = {}
    for sizes in ((4, 8), (1,), (2,)):  # in this order, for the one that moves
        traces |= run_many(folder / f"{sizes[0]}", {size: plan[size] for size in sizes})
    return traces


@pytest.fixture(scope="module")
def trace(traces: dict[str, Trace]) -> Callable[[str, int], Trace]:
    def named(name: str, size: int) -> Trace:
        found = traces[f"{name}-{size}"]
        assert not found.trouble, found.trouble
        return found

    return named


@pytest.mark.parametrize(
    ("name", "size"),
    [("float32", 2), ("float32", 4), ("float32", 8), ("bf16", 2), ("bf16", 4)],
)
def test_to_the_last_bit(name: str, size: int, trace: Callable[[str, int], Trace]) -> None:
    mine, one = trace(name, size), trace(name, 1)
    assert ending(mine) == ending(one)
    assert [row["weights"] for row in mine.rows("state")[: len(one.rows("state"))]] == [
        row["weights"] for row in one.rows("state")
    ], "after every step"
    for kind, what in (("update", "gradients"), ("state", "weights"), ("state", "buffers")):
        assert disagreement(mine, kind, what) == "", "all ranks have the same"


def test_the_runs_are_what_they_claim(trace: Callable[[str, int], Trace]) -> None:
    """Ragged steps, mixing, moving statistics, and that bf16 is another run."""
    one = trace("float32", 1)
    sizes = [sum(len(tile.ids) for tile in tiles) for tiles in one.tiles.values()]
    assert sizes == [16, 9] * 2 and len(one.metrics) == 2 * STEPS
    assert any(tile.share < 1 for tiles in one.tiles.values() for tile in tiles)
    assert len({row["buffers"] for row in one.rows("state")}) == 2 * STEPS + 1
    assert ending(trace("bf16", 1))["model"] != ending(one)["model"]
    pids = {row["pid"] for row in trace("float32", 8).rows("start")}
    assert len(pids) == 8, "real processes"


def test_stopped_and_gone_on_with_other_numbers_of_processes(
    traces: dict[str, Trace], trace: Callable[[str, int], Trace]
) -> None:
    """4 processes, stopped in the middle of an epoch; 1, stopped in the middle of the next; 2 to the end."""
    parts = [traces[f"moved-{size}"] for size in (4, 1, 2)]
    assert [part.trouble for part in parts] == ["", "", ""]
    begun = [part.rows("start")[0]["total"] for part in parts]
    assert begun == [0, STOPS[0] + 1, STOPS[1] + 1]
    assert ending(parts[-1]) == ending(trace("float32", 1))


@pytest.mark.parametrize(("name", "again"), [("float32", "tree-again"), ("ddp", "ddp-again")])
def test_twice_over_is_the_same(name: str, again: str, trace: Callable[[str, int], Trace]) -> None:
    assert ending(trace(name, 2)) == ending(trace(again, 2))


@pytest.mark.parametrize("size", [2, 4])
def test_ddp_in_float32(size: int, trace: Callable[[str, int], Trace]) -> None:
    """The first step is right up to rounding; what becomes of it later is chaos, which is why there is the tree."""
    mine, one = trace("ddp", size), trace("ddp", 1)
    gradient = relative(kept(mine, "gradients-0"), kept(one, "gradients-0"))
    weights = relative(kept(mine, "state-1"), kept(one, "state-1"))
    assert gradient <= 1e-6 and weights <= 1e-6
    assert mine.metrics[0]["train/loss"] == pytest.approx(one.metrics[0]["train/loss"], rel=1e-12)
    assert mine.ledger == one.ledger and ending(mine)["losses"] != []


@pytest.mark.parametrize("size", [2, 4])
def test_ddp_in_float64(size: int, trace: Callable[[str, int], Trace]) -> None:
    mine, one = trace("ddp64", size), trace("ddp64", 1)
    first = kept(one, "gradients-0")
    assert {tensor.dtype for tensor in first.values()} == {torch.float64} and len(one.metrics) >= 40
    assert relative(kept(mine, "gradients-0"), first) <= 1e-12
    assert relative(weights_of(mine), weights_of(one)) <= 1e-9
    losses = np.array([[row["train/loss"] for row in run.metrics] for run in (mine, one)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
