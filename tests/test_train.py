"""The trajectory: the same from any number of processes, and the same whether or not a run was interrupted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from distcnn import checkpoint
from distcnn.data import keyed
from distcnn.data.loader import TileRequest
from distcnn.errors import UserError
from distcnn.job import Job
from distcnn.preempt import Preempted
from distcnn.train import epoch_order, forward_seed, train
from distcnn.world import World
from tests.harness import Trace, simulate, small_config, trace_of

MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"checkpoint_every": 1, "log_every": 2},
    "resnet18": {"model": "resnet18", "epochs": 1, "optimizer": "sgd", "global_batch_size": 64, "tile_size": 8},
}


@pytest.fixture(scope="module")
def alone(stripes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trace]:
    """The trace of a run of one process, by the real Runtime."""
    traces: dict[str, Trace] = {}

    def run(model: str) -> Trace:
        if model not in traces:
            output = tmp_path_factory.mktemp("alone") / model
            train(small_config(stripes_set, output, **MODELS[model]), World())
            traces[model] = trace_of(output)
        return traces[model]

    return run


@pytest.mark.parametrize(
    ("model", "ranks"), [("cnn", 1), ("cnn", 2), ("cnn", 4), ("cnn", 8), ("resnet18", 2), ("resnet18", 8)]
)
def test_the_same_run_from_any_number_of_ranks(
    alone: Callable[[str], Trace], model: str, ranks: int, stripes_set: Path, tmp_path: Path
) -> None:
    """Batch norm, augmentation, mixing, dropout, averages, and a step in which most ranks have nothing to do."""
    simulate(small_config(stripes_set, tmp_path / "run", **MODELS[model]), ranks)
    found, expected = trace_of(tmp_path / "run"), alone(model)
    assert found.metrics == expected.metrics, "losses, learning rates, gradient norms and evaluations, to the last bit"
    assert found.ledger == expected.ledger and all(row["exactly_once"] for row in found.ledger)
    assert found.weights == expected.weights and len(found.weights) >= len(found.ledger)


def test_a_number_of_ranks_that_is_no_power_of_two(stripes_set: Path, tmp_path: Path) -> None:
    """12 lanes on 3 ranks are subtrees: the same bits. 8 lanes on 3 are not: the same up to rounding."""
    twelve = {"global_batch_size": 48, "epochs": 1, "mixup": 0.0}
    for ranks in (1, 3, 12):
        simulate(small_config(stripes_set, tmp_path / f"twelve{ranks}", **twelve), ranks)
    assert trace_of(tmp_path / "twelve3") == trace_of(tmp_path / "twelve1") == trace_of(tmp_path / "twelve12")
    for ranks in (1, 3):
        simulate(small_config(stripes_set, tmp_path / f"eight{ranks}", epochs=1), ranks)
    one, three = trace_of(tmp_path / "eight1"), trace_of(tmp_path / "eight3")
    assert three.ledger == one.ledger
    assert three.metrics[0]["train/loss"] == pytest.approx(one.metrics[0]["train/loss"], rel=1e-6)


class Crash(Exception):
    """Stands for a process that dies."""


def crash_at(step: int) -> Callable[[Job], None]:
    """Every rank dies in the middle of step number `step` (from 1), after what was being written is on the disk."""

    def prepare(job: Job) -> None:
        whole = job.optimizer.step

        def fails(*arguments: Any) -> Any:
            if job.position.total + 1 == step:
                raise Crash
            return whole(*arguments)

        job.optimizer.step = fails  # type: ignore[method-assign]

    return prepare


def stop_at(step: int) -> Callable[[Job], None]:
    """The last rank alone is asked to stop during step number `step` (from 1)."""

    def prepare(job: Job) -> None:
        whole = job.optimizer.step

        def asked(*arguments: Any) -> Any:
            if job.position.total + 2 == step and job.runtime.world.rank == job.runtime.world.size - 1:
                job.stop.reason = "a test"
            return whole(*arguments)

        job.optimizer.step = asked  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    ("how", "step", "ranks", "ranks_after"),
    [
        (crash_at, 1, 1, 1),  # before anything was saved
        (crash_at, 2, 2, 1),
        (crash_at, 3, 1, 4),
        (crash_at, 4, 8, 2),
        (crash_at, 5, 4, 8),
        (crash_at, 6, 1, 1),
        (stop_at, 2, 2, 4),
        (stop_at, 3, 4, 1),  # the last step of an epoch: the evaluation is made by the run resumed
        (stop_at, 5, 1, 2),
    ],
)
def test_a_run_interrupted_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(
    alone: Callable[[str], Trace],
    how: Callable[[int], Callable[[Job], None]],
    step: int,
    ranks: int,
    ranks_after: int,
    stripes_set: Path,
    tmp_path: Path,
) -> None:
    config = small_config(stripes_set, tmp_path / "run", **MODELS["cnn"])
    with pytest.raises((Crash, Preempted)):
        simulate(config, ranks, how(step))
    if how is stop_at:
        assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "stopped"
    simulate(config, ranks_after)
    found, expected = trace_of(tmp_path / "run"), alone("cnn")
    assert found.metrics == expected.metrics and found.ledger == expected.ledger
    assert found.weights == expected.weights


def test_a_run_resumed_from_a_checkpoint_by_name(
    alone: Callable[[str], Trace], stripes_set: Path, tmp_path: Path
) -> None:
    """Into another folder; there it has only the rows that come after."""
    config = small_config(stripes_set, tmp_path / "run", **MODELS["cnn"])
    with pytest.raises(Crash):
        simulate(config, 1, crash_at(6))
    chosen = tmp_path / "run" / "checkpoints" / "step_00000002"
    simulate(small_config(stripes_set, tmp_path / "other", resume=str(chosen), **MODELS["cnn"]), 2)
    found, expected = trace_of(tmp_path / "other"), alone("cnn")
    assert found.weights == {step: digest for step, digest in expected.weights.items() if step > 2}
    assert found.metrics == [row for row in expected.metrics if row["step"] > 2]
    with pytest.raises(UserError, match=r"holds another run \(lr was 0.003, now 0.5\)"):
        simulate(small_config(stripes_set, tmp_path / "third", resume=str(chosen), lr=0.5, **MODELS["cnn"]), 1)


def test_the_best_checkpoint_is_the_first_of_the_highest_score_and_stays(stripes_set: Path, tmp_path: Path) -> None:
    """A model that hardly learns scores the same at every epoch: the first is the best, and outlives pruning."""
    still = {"norm": "none", "lr": 1e-12, "ema_decay": 0.0, "epochs": 3, "keep_checkpoints": 1}
    results = simulate(small_config(stripes_set, tmp_path / "run", **still), 2)
    scores = [row["val/top1"] for row in trace_of(tmp_path / "run").metrics if "val/top1" in row]
    assert len(scores) == 3 and len(set(scores)) == 1
    assert (results["best/epoch"], results["best/top1"]) == (0, scores[0])
    kept = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in kept.glob("step_*")) == ["step_00000003", "step_00000009"]
    assert (kept / "best").resolve().name == "step_00000003" and (kept / "latest").resolve().name == "step_00000009"


def test_killed_between_the_last_checkpoint_and_the_results(
    alone: Callable[[str], Trace], stripes_set: Path, tmp_path: Path
) -> None:
    config = small_config(stripes_set, tmp_path / "run", **MODELS["cnn"])
    first = simulate(config, 1)
    (tmp_path / "run" / "results.json").unlink()
    again = simulate(config, 2)
    for name in ("status", "val/top1", "val/loss", "best/top1", "best/epoch", "steps", "confusion", "per_class"):
        assert again[name] == first[name], name
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "complete"
    assert trace_of(tmp_path / "run") == alone("cnn")


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_gradient_of_every_step_is_that_of_the_mean_over_its_samples(
    ranks: int, stripes_set: Path, tmp_path: Path
) -> None:
    """In float64, against one batch of the whole step; the last step's tiles hold one sample or none."""
    seen: dict[int, tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = {}
    job: list[Job] = []

    def watch(made: Job) -> None:
        job[:] = [made]
        whole, augment = made.optimizer.step, made.augment
        made.model.double()

        def noting(*arguments: Any) -> Any:
            gradients = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
            seen[made.position.step] = copy.deepcopy(made.model.state_dict()), gradients
            return whole(*arguments)

        def doubled(*arguments: Any, **named: Any) -> Any:
            x_NCHW, targets = augment(*arguments, **named)
            return x_NCHW.double(), targets

        made.optimizer.step = noting  # type: ignore[method-assign]
        made.augment = doubled  # type: ignore[assignment]

    plain = {"norm": "none", "mixup": 0.0, "cutmix": 0.0, "dropout": 0.0, "crop": "none", "flip": "none"}
    more = {"label_smoothing": 0.0, "clip_grad_norm": 0.0, "ema_decay": 0.0, "epochs": 1}
    simulate(small_config(stripes_set, tmp_path / "run", **plain, **more), ranks, watch)
    order, reference = epoch_order(job[0], 0), copy.deepcopy(job[0].model)
    assert order.steps == 3 and sorted(order.tile_sizes(2)) == [0] * 5 + [1] * 3
    for step in range(3):
        ids = np.concatenate([order.tile(step, lane) for lane in range(8)])
        (batch,) = next(job[0].loader.steps([[TileRequest(0, step, 0, ids)]]))
        x_NCHW, _ = job[0].augment(batch, torch.device("cpu"), train=False)
        reference.load_state_dict(seen[step][0])
        reference.zero_grad()
        cross_entropy(reference(x_NCHW), batch.labels).backward()
        for mine, parameter in zip(seen[step][1], reference.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.allclose(mine, parameter.grad, rtol=1e-10, atol=1e-14), f"step {step}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_by_all(
    ranks: int, stripes_set: Path, tmp_path: Path
) -> None:
    """Weights, averages of batch norm and momenta stay; the step counts, and the next one is as ever."""
    kept: list[str] = []

    def poison(job: Job) -> None:
        whole, augment = job.optimizer.step, job.augment

        def augments(tile: Any, device: Any, train: bool) -> Any:
            x_NCHW, targets = augment(tile, device, train)
            poisoned = train and (tile.request.step, tile.request.lane) == (1, 7)
            return (x_NCHW * float("nan") if poisoned else x_NCHW), targets

        def noting(*arguments: Any) -> Any:
            before = copy.deepcopy([job.model.state_dict(), job.optimizer.state_dict()])
            result = whole(*arguments)
            if job.position.step == 1:
                now = [job.model.state_dict(), job.optimizer.state_dict()]
                kept.append(str(all(torch.equal(before[0][name], now[0][name]) for name in now[0])))
            return result

        job.augment = augments  # type: ignore[assignment]
        job.optimizer.step = noting  # type: ignore[method-assign]

    simulate(small_config(stripes_set, tmp_path / "run", epochs=1, checkpoint_every=1), ranks, poison)
    assert kept == ["True"] * ranks
    for step in (2, 3):
        found = checkpoint.load(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
        assert all(value.isfinite().all() for value in found.model.values())
    assert trace_of(tmp_path / "run").ledger[0]["exactly_once"]


def test_a_run_that_has_diverged_stops_and_its_last_checkpoint_is_good(stripes_set: Path, tmp_path: Path) -> None:
    def poison(job: Job) -> None:
        augment = job.augment
        job.augment = lambda tile, device, train: (  # type: ignore[assignment]
            augment(tile, device, train)[0] * (float("inf") if tile.request.epoch else 1.0),
            augment(tile, device, train)[1],
        )

    config = small_config(stripes_set, tmp_path / "run", epochs=9, global_batch_size=8, tile_size=4)
    with pytest.raises(UserError, match="not finite in 10 steps in a row"):
        simulate(config, 2, poison)
    found, complaints = checkpoint.newest_whole(tmp_path / "run")
    assert found is not None and not complaints
    assert all(value.isfinite().all() for value in checkpoint.load(found).model.values())


def test_the_seed_of_a_forward_pass_belongs_to_the_tile() -> None:
    """It tells apart epochs, steps, lanes and seeds, and fits torch's generator; pinned, as runs depend on it."""
    ids = np.arange(4)
    keys = [(seed, epoch, step, lane) for seed in (0, 1) for epoch in (0, 1) for step in (0, 1) for lane in (0, 1)]
    seeds = [forward_seed(seed, TileRequest(epoch, step, lane, ids)) for seed, epoch, step, lane in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert forward_seed(3, TileRequest(2, 1, 5, ids)) == int(keyed.words(np.array([(1 << 24) | 5]), 3, 2, 11)[0]) >> 1
