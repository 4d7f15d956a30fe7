"""Runs with balanced sampling: the same from any number of processes, resumed exactly, proven by the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcnn.build import open_dataset, order_of
from distcnn.cli import main
from distcnn.data.balance import KINDS, epoch_samples
from distcnn.data.order import sample_of
from distcnn.data.prepare.arrays import source_of_arrays
from distcnn.data.prepare.build import Settings, build
from distcnn.data.shards import SplitReader
from distcnn.errors import UserError
from distcnn.job import Job
from distcnn.plan import Cluster, problems, shares
from distcnn.report.gather import gather
from distcnn.report.samples import training_batch
from distcnn.runfolder import LEDGER, QUARANTINE, read_rows
from distcnn.state import Ledger
from distcnn.status import look
from distcnn.train import train
from distcnn.world import World
from tests.harness import simulate, small_config, trace_of
from tests.support import stripes
from tests.test_train import Crash, crash_at

TRAIN, VAL = [30, 9, 4], [8, 8, 8]  # images of the classes
TAKEN: dict[str, Any] = {"checkpoint_every": 1, "balance": "sample"}


@pytest.fixture(scope="module")
def rare_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 training images of three classes of unequal size: 90 in a balanced epoch, steps of 32, 32 and 26."""
    root, noise = tmp_path_factory.mktemp("rare") / "set", np.random.default_rng(5)
    parts = []
    for split, counts in (("train", TRAIN), ("val", VAL)):
        labels = noise.permutation(np.repeat(np.arange(3), counts))
        parts.append((split, np.stack([stripes(int(label), 8, noise) for label in labels]), labels))
    build(source_of_arrays("arrays", "rare", parts), root, Settings())
    return root


@pytest.fixture(scope="module")
def alone(rare_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run of one process, by the real Runtime."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(small_config(rare_set, output, **TAKEN), World())
    return output


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_same_run_from_any_number_of_ranks(alone: Path, ranks: int, rare_set: Path, tmp_path: Path) -> None:
    simulate(small_config(rare_set, tmp_path / "run", **TAKEN), ranks)
    assert trace_of(tmp_path / "run") == trace_of(alone) and len(trace_of(alone).weights) == 6


@pytest.mark.parametrize(("step", "ranks", "ranks_after"), [(2, 1, 4), (3, 4, 1), (6, 2, 8)])
def test_a_run_that_died_ends_as_if_it_had_not(
    alone: Path, step: int, ranks: int, ranks_after: int, rare_set: Path, tmp_path: Path
) -> None:
    config = small_config(rare_set, tmp_path / "run", **TAKEN)
    with pytest.raises(Crash):
        simulate(config, ranks, crash_at(step))
    simulate(config, ranks_after)
    assert trace_of(tmp_path / "run") == trace_of(alone)


@pytest.mark.parametrize(("kind", "per_class"), [("sample", [30, 30, 30]), ("sample-sqrt", [30, 16, 11])])
def test_each_class_comes_as_often_as_it_should_and_the_ledger_proves_it(
    kind: str, per_class: list[int], rare_set: Path, tmp_path: Path
) -> None:
    labels: dict[int, list[int]] = {0: [], 1: []}

    def watch(job: Job) -> None:
        augment = job.augment

        def noting(tile: Any, device: Any, train: bool) -> Any:
            if train and tile.weights.any():
                labels[tile.request.epoch] += tile.labels.tolist()
            return augment(tile, device, train)

        job.augment = noting  # type: ignore[assignment]

    config = small_config(rare_set, tmp_path / "run", balance=kind)
    results = simulate(config, 2, watch)
    assert [np.bincount(labels[epoch]).tolist() for epoch in (0, 1)] == [per_class] * 2
    rows = read_rows(tmp_path / "run" / LEDGER)
    most = -(-per_class[2] // 4)
    assert [(row["samples"], row["distinct_samples"], row["times"]) for row in rows] == [
        (sum(per_class), 43, [1, most])
    ] * 2
    assert all(row["exactly_once"] and row["digest"] == row["expected_digest"] for row in rows)
    assert results["val_samples"] == sum(VAL) and np.sum(results["confusion"], axis=1).tolist() == VAL
    manifest = open_dataset(config, World()).manifest
    assert epoch_samples(manifest.split("train"), kind) == sum(per_class)
    (tmp_path / "run" / "results.json").unlink()  # as long as it runs, the length is computed
    steps = 2 * -(-sum(per_class) // 32)
    assert look(tmp_path / "run").rows["step"] == f"{steps} of {steps} (epoch 2 of 2), 100.00 %"


def test_an_epoch_that_was_not_what_was_planned_stops_the_run(
    rare_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would if every repeat were a first time."""
    added = Ledger.add
    monkeypatch.setattr(Ledger, "add", lambda self, ids: added(self, sample_of(ids)))
    with pytest.raises(RuntimeError, match="epoch 0 was not exactly once"):
        train(small_config(rare_set, tmp_path / "run", **TAKEN), World())


def test_a_bad_image_is_named_each_time(rare_set: Path, tmp_path: Path) -> None:
    """A rare image whose file is damaged after it was indexed: weight 0, and the order stays."""

    def damage(job: Job) -> None:
        reader = job.loader.reader
        assert isinstance(reader, SplitReader)
        read, bad = reader.read, int(np.flatnonzero(reader.all_labels() == 2)[0])

        def reads(ids: Any, found: Any = None) -> list[bytes]:
            whole = read(ids, found)
            return [b"no image" if sample == bad else data for sample, data in zip(sample_of(ids), whole, strict=True)]

        reader.read = reads  # type: ignore[method-assign]

    simulate(small_config(rare_set, tmp_path / "run", balance="sample", epochs=1, cache="off"), 2, damage)
    rows = read_rows(tmp_path / "run" / QUARANTINE)
    assert len(rows) in (7, 8) and len({row["key"] for row in rows}) == 1
    assert read_rows(tmp_path / "run" / LEDGER)[0]["exactly_once"]


def test_plan_knows_the_epoch(rare_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--data", str(rare_set), "--global-batch-size", "32", "--balance", "sample"]) == 0
    out = capsys.readouterr().out
    assert "43 images of 3 classes" in out and "90 images: --balance sample repeats those of rare classes" in out
    assert "3 steps an epoch, 60 in 20 epochs" in out and "last step  26 images" in out
    config = small_config(rare_set, Path("unused"), balance="sample")
    dataset = open_dataset(config, World())
    assert shares(config, dataset, Cluster()).samples == order_of(config, dataset, 1).samples == 90
    assert not [problem for problem in problems(config, dataset, Cluster()) if "rare" in problem.text]


def test_the_report_shows_the_batch_that_was_trained_on(alone: Path) -> None:
    labels = [picture.label for picture in training_batch(gather([alone])[0])]
    assert len(labels) == 24 and labels.count(0) < 18


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_and_another_balance_are_refused(kind: str, rare_set: Path, tmp_path: Path) -> None:
    config = small_config(rare_set, tmp_path / "stream", balance=kind, crop="auto", loader="stream")
    with pytest.raises(UserError, match="--balance needs --loader exact: of a stream nobody knows"):
        train(config, World())
    train(small_config(rare_set, tmp_path / "run", balance=kind, epochs=1), World())
    with pytest.raises(UserError, match=f"balance was '{kind}', now 'none'"):
        train(small_config(rare_set, tmp_path / "run", epochs=1), World())


def test_verify_walks_through_the_repeats(rare_set: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["--channels", "4", "--hidden", "0", "--global-batch-size", "16", "--tile-size", "4", "--balance", "sample"]
    words = ["verify", "--data", str(rare_set), "--output", str(tmp_path / "out"), *small, "--steps", "2"]
    assert main([*words, "--processes", "1,2", "--only", "order", "pixels"]) == 0, capfd.readouterr().out
    assert "order of 90 samples walked through for 2 epochs" in (tmp_path / "out" / "verify.json").read_text()
