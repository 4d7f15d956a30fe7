from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from distcnn.config import RunConfig
from distcnn.distributed import tensorboard_tracker
from distcnn.state import Position
from distcnn.tensorboard import FOLDER
from distcnn.tracking import Tracker

pytest.importorskip("tensorboard", reason="an optional extra")


@pytest.fixture(autouse=True)
def accelerator() -> None:
    """What a Runtime has made before anything is tracked."""
    Accelerator(cpu=True)


def track(run: Path, position: Position, steps: range) -> list[str]:
    """Rows of these steps; what was warned of."""
    warnings: list[str] = []
    tracker = Tracker(run, RunConfig(wandb_mode="disabled"), {"lr": 0.5}, position, "", warnings.append)
    for step in steps:
        tracker.log({"step": step, "epoch": 0, "samples_seen": 64 * step, "train/loss": 1 / step, "name": "text"})
    tracker.log({"step": step, "epoch": 1, "samples_seen": 64 * step, "val/top1": 0.5, "val/loss": math.nan})
    tracker.close({"status": "complete"})
    return warnings


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (samples seen, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / FOLDER))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_it_shows_the_rows_over_samples_seen_and_after_a_resumption_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCNN_TENSORBOARD", "1")
    assert track(tmp_path, Position(), range(1, 6)) == []
    found = scalars(tmp_path)
    assert found["train/loss"] == [(64 * step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert found["val/top1"] == [(320, 0.5)] and set(found) == {"train/loss", "val/top1", "val/loss"}
    assert track(tmp_path, Position(0, 3, 3, 192), range(4, 8)) == []
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [64 * step for step in range(1, 8)]
    assert [path.is_file() for path in (tmp_path / FOLDER).iterdir()] == [True, True], "one run, not one a start"


def test_it_is_accelerates_tracker(tmp_path: Path) -> None:
    tracker = tensorboard_tracker(tmp_path / "board", purge_step=3)
    assert isinstance(tracker, TensorBoardTracker) and tracker.tracker.log_dir == str(tmp_path / "board")
    tracker.finish()


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_it_is_off_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DISTCNN_TENSORBOARD", value)
    assert track(tmp_path, Position(), range(1, 3)) == []
    assert not (tmp_path / FOLDER).exists()


def test_trouble_is_one_warning_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCNN_TENSORBOARD", "1")
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    (warning,) = track(tmp_path, Position(), range(1, 6))
    assert warning.startswith("TensorBoard stopped (")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6


def test_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCNN_TENSORBOARD", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (warning,) = track(tmp_path, Position(), range(1, 3))
    assert "pip install distcnn[tensorboard]" in warning
