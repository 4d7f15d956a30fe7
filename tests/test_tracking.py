from __future__ import annotations

import json
from pathlib import Path

import pytest

from distcnn.config import RunConfig
from distcnn.runfolder import append_row, read_rows
from distcnn.state import Position
from distcnn.tracking import Tracker
from tests import wandb_file
from tests.support import command, python

ROWS = [{"step": 10 * n, "epoch": n, "samples_seen": 640 * n, "train/loss": 1 / n} for n in range(1, 5)]


def test_metrics_jsonl_without_wandb(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, RunConfig(wandb_mode="disabled"), {}, Position(), "", pytest.fail)
    for row in ROWS:
        tracker.log(row)
    tracker.close({"status": "complete"})
    assert read_rows(tmp_path / "metrics.jsonl") == ROWS and tracker.wandb_id == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("position", "kept"),
    [
        (Position(), 0),  # from the beginning: all rows are of a run that is no more
        (Position(epoch=2, step=3, total=23), 2),
        (Position(epoch=2, step=0, total=20), 2),
        (Position(epoch=1, step=20, total=20), 1),  # its steps are done, but the epoch is not closed: no evaluation yet
        (Position(epoch=9, step=0, total=99), 4),
    ],
)
def test_rows_past_the_checkpoint_are_cut(tmp_path: Path, position: Position, kept: int) -> None:
    for row in ROWS:
        append_row(tmp_path / "metrics.jsonl", row)
    tracker = Tracker(tmp_path, RunConfig(wandb_mode="disabled"), {}, position, "", pytest.fail)
    assert read_rows(tmp_path / "metrics.jsonl") == ROWS[:kept]
    tracker.log({"step": 100, "epoch": 9})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == kept + 1


# In a process of its own, since W&B starts services. Prints the id, then what went wrong.
TRACK = """
import json, sys
from pathlib import Path
from distcnn.config import RunConfig
from distcnn.state import Position
from distcnn.tracking import Tracker
mode, wandb_id, step, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
config = RunConfig(wandb_mode=mode, wandb_project="p", wandb_name="n")
tracker = Tracker(Path("run"), config, {"lr": 0.5}, Position(epoch=step // 10, total=step), wandb_id, print)
for row in rows:
    tracker.log(row)
tracker.close({"val/top1": 0.75})
print(tracker.wandb_id)
"""


def test_wandb_gets_the_same_rows_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Without a key `online` goes offline, and never asks."""
    (tmp_path / "run").mkdir()
    environment = {"NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    first = command(python("-c", TRACK, "online", "", "0", json.dumps(ROWS[:3])), tmp_path, **environment)
    assert first.code == 0 and len(first.out.split()) == 1, first.out + first.err
    run_id = first.out.strip()
    second = command(python("-c", TRACK, "offline", run_id, "20", json.dumps(ROWS[2:])), tmp_path, **environment)
    assert second.out.strip() == run_id, second.out + second.err
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == ROWS
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_id) for folder in folders)
    for folder, rows in zip(folders, (ROWS[:3], ROWS[2:]), strict=True):
        records = wandb_file.records(folder)
        assert wandb_file.rows(records) == rows
        assert wandb_file.summary(records)["val/top1"] == 0.75
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project, run.display_name) == (run_id, "p", "n")
        assert {update.key: update.value_json for update in run.config.update}["lr"] == "0.5"


def test_wandb_that_fails_is_one_warning_and_nothing_else(tmp_path: Path) -> None:
    """Here its folder cannot be made. Metrics are written all the same."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where the folder should be")
    done = command(python("-c", TRACK, "offline", "abc", "0", json.dumps(ROWS)), tmp_path, HOME=str(tmp_path))
    *warnings, run_id = done.out.splitlines()
    assert done.code == 0 and run_id == "abc" and read_rows(tmp_path / "run" / "metrics.jsonl") == ROWS
    assert len(warnings) == 1 and warnings[0].startswith("W&B stopped ("), done.out + done.err
