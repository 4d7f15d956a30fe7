from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distcnn.config import RunConfig
from distcnn.metrics import wilson
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


def test_a_note_among_the_rows_is_kept(tmp_path: Path) -> None:
    for row in (ROWS[0], {"note": "by hand"}, ROWS[3]):
        append_row(tmp_path / "metrics.jsonl", row)
    Tracker(tmp_path, RunConfig(wandb_mode="disabled"), {}, Position(epoch=1, step=0, total=10), "", pytest.fail)
    assert read_rows(tmp_path / "metrics.jsonl") == [ROWS[0], {"note": "by hand"}]


# In a process of its own, since W&B starts services. Prints the id, then what went wrong.
TRACK = """
import json, sys
from pathlib import Path
from distcnn.config import RunConfig
from distcnn.state import Position
from distcnn.tracking import Tracker
mode, wandb_id, step, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
flags = json.loads(sys.argv[5]) if sys.argv[5:] else {}
config = RunConfig(wandb_mode=mode, wandb_project="p", wandb_name="n", **flags)
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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (["from", "outside"], "the group", "the notes")),  # what no flag says, W&B's variables say
        ({"wandb_tags": ["a", "b c"]}, (["a", "b c"], "the group", "the notes")),
        (
            {"wandb_tags": ["a"], "wandb_group": "g", "wandb_notes": "two\nlines"},
            (["a"], "g", "two\nlines"),
        ),
    ],
)
def test_tags_group_and_notes_of_the_flags_win_over_the_environment(
    flags: dict[str, Any], expected: tuple[list[str], str, str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    variables = {"WANDB_TAGS": "from,outside", "WANDB_RUN_GROUP": "the group", "WANDB_NOTES": "the notes"}
    words = python("-c", TRACK, "offline", "", "0", json.dumps(ROWS[:1]), json.dumps(flags))
    done = command(words, tmp_path, HOME=str(tmp_path), **variables)
    assert done.code == 0 and len(done.out.split()) == 1, done.out + done.err
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    run = next(record.run for record in wandb_file.records(folder) if record.WhichOneof("record_type") == "run")
    assert (list(run.tags), run.run_group, run.notes) == expected


def test_wandb_that_fails_is_one_warning_and_nothing_else(tmp_path: Path) -> None:
    """Here its folder cannot be made. Metrics are written all the same."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where the folder should be")
    done = command(python("-c", TRACK, "offline", "abc", "0", json.dumps(ROWS)), tmp_path, HOME=str(tmp_path))
    *warnings, run_id = done.out.splitlines()
    assert done.code == 0 and run_id == "abc" and read_rows(tmp_path / "run" / "metrics.jsonl") == ROWS
    assert len(warnings) == 1 and warnings[0].startswith("W&B stopped ("), done.out + done.err


# The end of a run. Prints the id, then what went wrong.
END = """
import sys, time
from pathlib import Path
import numpy as np
from distcnn.config import RunConfig
from distcnn.outcome import Case, Outcome
from distcnn.state import Position
from distcnn import tracking
from distcnn.tracking import Ending, Tracker
cases = [Case(n, "s.tar", "k\\udcff", n % 2, 1 - n % 2, 0.5 + n / 10, float(n)) for n in range(3)]
outcome = Outcome(
    "val", 1, 10, 640, ("<b>", "\\udc80"), {}, ((0, 0, 5), (0, 1, 2), (1, 0, 3)), ((0, 0.0, 0), (10, 7.5, 5)),
    tuple(cases), tuple(cases[:1]),
)
def pictures(ids):
    if sys.argv[1] == "hang":
        time.sleep(3600)
    if sys.argv[1] == "fail":
        raise OSError("the set is gone")
    return {0: np.zeros((4, 5, 3), np.uint8), 1: np.full((4, 5, 3), 200, np.uint8)}
folder = Path("run") / "step_1"
folder.mkdir(exist_ok=True)
(folder / "model.safetensors").write_bytes(b"weights")
dataset = {"name": "a b/<c>", "fingerprint": "f00d", "classes": ["<b>"]}
config = RunConfig(wandb_mode="offline")
if sys.argv[1] == "hang":
    tracking.FINISH_SECONDS = 10
tracker = Tracker(Path("run"), config, {}, Position(), "", print)
tracker.log({"step": 10, "epoch": 1, "samples_seen": 640, "val/top1": 0.5})
tracker.close({"status": "complete"}, Ending(outcome, pictures, {"latest": folder, "best": folder}, dataset))
print(tracker.wandb_id)
"""


def ended(folder: Path, how: str, **environment: str) -> tuple[list[str], list[Any]]:
    """(what was printed, the records) of a run that ends."""
    (folder / "run").mkdir()
    done = command(python("-c", END, how), folder, HOME=str(folder / "home"), **environment)
    assert done.code == 0, done.err
    (offline,) = (folder / "run" / "wandb").glob("offline-run-*")
    return done.out.splitlines(), wandb_file.records(offline)


def test_the_end_of_a_run_in_wandb(tmp_path: Path) -> None:
    names = {"WANDB_TAGS": "a,b", "WANDB_RUN_GROUP": "g", "WANDB_NOTES": "n", "WANDB_RUN_ID": "of-a-sweep"}
    said, records = ended(tmp_path, "well", **names)
    assert said == ["of-a-sweep"]
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (list(run.tags), run.run_group, run.notes, run.run_id) == (["a", "b"], "g", "n", "of-a-sweep")
    assert [row["samples_seen"] for row in wandb_file.rows(records)] == [640]
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")}
    assert (
        set(tables)
        == {"classes", "reliability", "confusion", "samples"}
        <= {name.removeprefix(wandb_file.ENDING).removesuffix("_table") for name in wandb_file.media(records)}
    )
    low, high = wilson(5, 7)
    assert tables["classes"]["data"] == [
        ["<b>", 7, 5 / 7, low, high, 5 / 8, 2 / 3],
        ["\\udc80", 3, 0, 0, wilson(0, 3)[1], 0, 0],
    ]
    assert tables["reliability"]["data"] == [[0.75, 0.5, 10]], "empty bins have no confidence"
    counts = {(row[0], row[1]): row[2] for row in tables["confusion"]["data"]}
    assert counts == {("<b>", "<b>"): 5, ("<b>", "\\udc80"): 2, ("\\udc80", "<b>"): 3, ("\\udc80", "\\udc80"): 0}
    rows = tables["samples"]["data"]
    assert [(row[0], row[1]) for row in rows] == [
        ("most wrong", "Image"),
        ("most wrong", "Image"),
        ("most wrong", None),  # it could not be read
        ("least certain", "Image"),
    ]
    assert rows[1][2:] == ["s.tar", "k\\udcff", "\\udc80", "<b>", 0.6, 1.0]
    (data,) = wandb_file.artifacts(records, "dataset")
    assert data.name == "a-b--c-" and json.loads(data.metadata) == {"fingerprint": "f00d", "classes": ["<b>"]}
    assert [entry.path for entry in data.manifest.contents] == ["fingerprint.txt"]
    (model,) = wandb_file.artifacts(records, "model")
    assert model.name == "model-of-a-sweep" and set(model.aliases) == {"best", "latest"}
    assert [entry.path for entry in model.manifest.contents] == ["model.safetensors"]
    assert not (tmp_path / "home" / ".local").exists()


def test_what_fails_at_the_end_takes_nothing_else_with_it(tmp_path: Path) -> None:
    said, records = ended(tmp_path, "fail", WANDB_LOG_MODEL="false")
    assert len(said) == 2 and "W&B has not all of the run's end" in said[0] and "the set is gone" in said[0]
    assert wandb_file.summary(records)["status"] == "complete"
    assert "evaluation/classes" in wandb_file.media(records) and wandb_file.artifacts(records, "dataset")
    assert not wandb_file.artifacts(records, "model"), "WANDB_LOG_MODEL=false keeps checkpoints here"


@pytest.mark.slow
def test_an_end_that_hangs_is_left_behind(tmp_path: Path) -> None:
    said, records = ended(tmp_path, "hang")
    assert len(said) == 2 and said[0].startswith("W&B did not finish within 10 s; 'wandb sync ")
    assert [row["val/top1"] for row in wandb_file.rows(records)] == [0.5], "the rows are safe"
