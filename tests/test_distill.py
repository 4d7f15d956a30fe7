# N samples, K classes
"""A teacher's part of the loss, that it leaves the run the same from any ranks, and which teachers are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from distcnn import checkpoint
from distcnn import train as training
from distcnn.augment import Targets
from distcnn.blackbox import Workbench
from distcnn.build import make_augment, make_model, open_dataset
from distcnn.classifier import load_model
from distcnn.distill import load_teacher
from distcnn.errors import UserError
from distcnn.job import Job
from distcnn.losses import Loss, loss_sum
from distcnn.plan import memory
from distcnn.runfolder import METRICS, read_rows
from distcnn.train import train
from distcnn.world import World
from tests.harness import Trace, simulate, small_config, trace_of
from tests.support import make_stripes
from tests.test_step import NothingRead, Unread
from tests.test_train import Crash, crash_at

STUDENT: dict[str, Any] = {"checkpoint_every": 1, "distill_weight": 0.7, "distill_temperature": 3.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(stripes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of another network, with averaged weights."""
    output = tmp_path_factory.mktemp("teacher") / "run"
    train(small_config(stripes_set, output, channels=[8], mixup=0.0, cutmix=0.0, keep_checkpoints=1), World())
    return output


@pytest.fixture(scope="module")
def alone(teacher: Path, stripes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The trace of a student of one process, by the real Runtime."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(small_config(stripes_set, output, distill=str(teacher), **STUDENT), World())
    return trace_of(output)


LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TAUGHT = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
def test_the_loss_is_hintons(share: float, temperature: float) -> None:
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    loss = Loss("ce", 0.1, torch.tensor([0.5, 2.0, 1.0]), share, temperature)
    found = loss_sum(LOGITS, Targets(LABELS, LABELS, 1.0, weights, TAUGHT), loss)
    hard = cross_entropy(LOGITS, LABELS, loss.class_weights.double(), reduction="none", label_smoothing=0.1)  # type: ignore[union-attr]
    soft = kl_div(log_softmax(LOGITS / temperature, 1), softmax(TAUGHT / temperature, 1), reduction="none").sum(1)
    assert torch.allclose(found, (((1 - share) * hard + share * temperature**2 * soft) * weights).sum(), rtol=1e-9)
    alone = loss_sum(LOGITS, Targets(LABELS, LABELS, 1.0, weights), loss)
    assert torch.allclose(alone, (hard * weights).sum()), "without a teacher its share is not taken off"


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    given = TAUGHT.clone().requires_grad_()
    loss = loss_sum(given, Targets(LABELS, LABELS, 1.0, torch.ones(4), TAUGHT), Loss(distill=1.0, temperature=2.0))
    loss.backward()
    assert given.grad is not None and abs(loss.item()) < 1e-12 and given.grad.abs().max() < 1e-12


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_same_run_from_any_number_of_ranks(
    alone: Trace, ranks: int, teacher: Path, stripes_set: Path, tmp_path: Path
) -> None:
    simulate(small_config(stripes_set, tmp_path / "run", distill=str(teacher), **STUDENT), ranks)
    assert trace_of(tmp_path / "run") == alone and len(alone.weights) == 6


@pytest.mark.parametrize(("step", "ranks", "ranks_after"), [(2, 1, 4), (5, 4, 1)])
def test_a_run_that_died_ends_as_if_it_had_not_though_its_teacher_has_moved(
    alone: Trace, step: int, ranks: int, ranks_after: int, teacher: Path, stripes_set: Path, tmp_path: Path
) -> None:
    with pytest.raises(Crash):
        simulate(small_config(stripes_set, tmp_path / "run", distill=str(teacher), **STUDENT), ranks, crash_at(step))
    shutil.copytree(teacher, tmp_path / "moved", symlinks=True)
    simulate(small_config(stripes_set, tmp_path / "run", distill=str(tmp_path / "moved"), **STUDENT), ranks_after)
    assert trace_of(tmp_path / "run") == alone


def test_the_teacher_changes_the_run_and_is_not_in_its_checkpoints(
    alone: Trace, teacher: Path, stripes_set: Path, tmp_path: Path
) -> None:
    train(small_config(stripes_set, tmp_path / "run", **STUDENT), World())
    untaught = trace_of(tmp_path / "run")
    assert untaught.weights.keys() == alone.weights.keys() and untaught.weights != alone.weights
    train(small_config(stripes_set, tmp_path / "taught", distill=str(teacher), **STUDENT, epochs=1), World())
    mine = checkpoint.load(checkpoint.find_checkpoint(tmp_path / "taught"))
    theirs = checkpoint.find_checkpoint(teacher)
    manifest = json.loads((theirs / "manifest.json").read_text())
    assert mine.state["teacher"] == {"path": str(teacher), "sha256": manifest["files"]["ema.safetensors"]["sha256"]}
    own = checkpoint.load(checkpoint.find_checkpoint(tmp_path / "run"))
    assert mine.model.keys() == own.model.keys() and mine.trainer.keys() == own.trainer.keys()
    assert own.state["teacher"] is None


def test_the_teacher_sees_the_mixed_tile_in_its_own_normalisation(
    teacher: Path, stripes_set: Path, tmp_path: Path
) -> None:
    """In evaluation mode, without a gradient; its averaged weights, or those that the file names."""
    config = small_config(stripes_set, tmp_path / "run", distill=str(teacher))
    dataset = open_dataset(config, World())
    other = dataclasses.replace(dataset, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    for seen in (dataset, other):
        found = load_teacher(config, seen, CPU)
        assert found is not None and not found.model.training and (found.scale is None) == (seen is dataset)
        augment, plain = make_augment(config, seen), make_augment(config, dataset)
        bench = Workbench.build(config, dataset, make_model(config, dataset).state_dict(), 0, CPU)
        (tile,) = bench.tiles(0, [3])
        x_NCHW, targets = augment(tile, CPU, train=True)
        assert targets.share < 1, "mixed"
        taught = found.teach(x_NCHW, targets)
        expected = load_model(teacher).model(plain(tile, CPU, train=True)[0])
        assert taught.teacher_logits is not None and not taught.teacher_logits.requires_grad
        assert torch.allclose(taught.teacher_logits, expected, atol=1e-5)
        assert torch.equal(taught.labels, targets.labels) and taught.share == targets.share
        bench.loader.close()
    folder = checkpoint.find_checkpoint(teacher)
    chosen = dataclasses.replace(config, optim=dataclasses.replace(config.optim, distill=f"{folder}/model.safetensors"))
    trained = load_teacher(chosen, dataset, CPU)
    assert trained is not None and trained.sha256 != load_teacher(config, dataset, CPU).sha256  # type: ignore[union-attr]
    assert all(
        torch.equal(value, checkpoint.load(folder).model[name]) for name, value in trained.model.state_dict().items()
    )


def test_a_black_box_has_the_teacher_too(teacher: Path, stripes_set: Path, tmp_path: Path) -> None:
    then: dict[int, float] = {}
    again: dict[int, float] = {}

    def watch(job: Job) -> None:
        bench = Workbench.build(job.config, job.dataset, job.model.state_dict(), 0, CPU)
        again.update({tile.request.lane: bench.examine(tile).loss for tile in bench.tiles(0, range(8))})
        bench.loader.close()
        noted = job.blackbox.tile

        def noting(lane: int, loss: torch.Tensor) -> None:
            then.setdefault(lane, loss.item())
            noted(lane, loss)

        job.blackbox.tile = noting  # type: ignore[method-assign]

    simulate(small_config(stripes_set, tmp_path / "run", distill=str(teacher), **STUDENT, epochs=1), 1, watch)
    assert len(then) == 8 and again == pytest.approx(then, rel=1e-5)


def damaged(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "damaged", symlinks=True)
    file = checkpoint.find_checkpoint(tmp_path / "damaged") / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return tmp_path / "damaged"


def exported(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(checkpoint.find_checkpoint(run) / "model.safetensors", tmp_path / "model.safetensors"))


Given = Callable[[Path, Path], Path]


@pytest.mark.parametrize(
    ("given", "values", "said"),
    [
        (
            lambda run, tmp: run,
            {"image_size": 12, "crop": "random-resized"},
            "images of 8 px, this run has 12: --image-size 8",
        ),
        (lambda run, tmp: run, {"loss": "bce"}, "--distill goes with --loss ce, not with bce"),
        (lambda run, tmp: run, {"progressive": [6, 8], "crop": "auto"}, "--distill goes without --progressive"),
        (lambda run, tmp: tmp / "nowhere", {}, "--distill: no checkpoint .*nowhere"),
        (lambda run, tmp: tmp, {}, "--distill: .* holds no checkpoint"),
        (exported, {}, "a file of weights alone does not say of which network"),
        (damaged, {}, "ema.safetensors does not match its checksum"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(
    given: Given, values: dict[str, Any], said: str, teacher: Path, stripes_set: Path, tmp_path: Path
) -> None:
    config = small_config(stripes_set, tmp_path / "run", distill=str(given(teacher, tmp_path)), **values)
    with pytest.raises(UserError, match=said) as caught:
        train(config, World())
    assert "\n" not in str(caught.value)


def test_a_teacher_of_other_classes_is_refused(teacher: Path, tmp_path: Path) -> None:
    more = make_stripes(tmp_path / "six", 30, 12, classes=6)
    with pytest.raises(UserError, match=r"has other classes than .*six \(5 for 6, without '.*'\): give a teacher"):
        train(small_config(more, tmp_path / "run", distill=str(teacher)), World())


def test_another_teacher_is_refused_when_a_run_goes_on(teacher: Path, stripes_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(Crash):
        simulate(small_config(stripes_set, output, distill=str(teacher), **STUDENT), 1, crash_at(3))
    other = str(checkpoint.find_checkpoint(teacher) / "model.safetensors")
    for given, now in ((other, "now .*model.safetensors"), ("", "now none")):
        with pytest.raises(UserError, match=f"has learnt from another teacher .*{now}") as caught:
            simulate(small_config(stripes_set, output, distill=given, **STUDENT), 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"distill_weight was 0\.7, now 0\.2"):
        simulate(small_config(stripes_set, output, distill=str(teacher), **(STUDENT | {"distill_weight": 0.2})), 1)


def test_in_half_precision_and_nothing_is_read_in_a_step(
    teacher: Path, stripes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.train_step

    def watched(*arguments: Any) -> Any:
        if arguments[0].position.total == 0:
            return step(*arguments)
        with NothingRead():
            return step(*arguments)

    def unread(job: Job) -> None:
        job.flags = Unread()  # type: ignore[assignment]

    monkeypatch.setattr(training, "train_step", watched)
    losses = []
    for precision in ("bf16", "no"):
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision that was asked for first
        values = STUDENT | {"mixed_precision": precision, "epochs": 1, "log_every": 99}
        training.train(small_config(stripes_set, tmp_path / precision, distill=str(teacher), **values), World(), unread)
        rows = read_rows(tmp_path / precision / METRICS)
        losses.append(next(row["val/loss"] for row in rows if "val/loss" in row))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_plan_counts_the_teachers_weights(teacher: Path, stripes_set: Path, tmp_path: Path) -> None:
    config = small_config(stripes_set, tmp_path / "run", distill=str(teacher))
    found = memory(config, open_dataset(config, World()), 8)
    assert found.teacher == (checkpoint.find_checkpoint(teacher) / "ema.safetensors").stat().st_size
    without = dataclasses.replace(config, optim=dataclasses.replace(config.optim, distill=""))
    assert found.total - memory(without, open_dataset(config, World()), 8).total == found.teacher > 0
