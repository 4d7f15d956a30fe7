"""Live or dead, and until when: from the files of runs, real ones and ones made for the case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from distcnn.errors import UserError
from distcnn.heartbeat import Heartbeat
from distcnn.status import judge, look, seconds_left
from tests.support import clean_environment, command, python


def beat(**changes: Any) -> Heartbeat:
    values: dict[str, Any] = {
        "rank": 0, "size": 2, "pid": 1, "host": "n7", "boot": "", "at": 0.0, "beat": 1, "progress": 1,
        "phase": "compute", "phase_seconds": 1.0, "epoch": 0, "step": 3, "total": 3, "made": 3, "shards": (),
        "key": "", "error": "", "age_seconds": 1.0,
    }  # fmt: skip
    return Heartbeat(**(values | changes))


STOPPED = {"status": "stopped", "saved": True, "step": 12, "reason": "SIGTERM"}


@pytest.mark.parametrize(
    ("beats", "results", "facts", "state", "said"),
    [
        ([beat()], {}, {}, "running", "1 of 2 processes"),
        ([beat()], STOPPED, {}, "running", "1 of 2"),  # of the start before
        ([beat(phase="ended")], {"status": "complete"}, {}, "complete", ""),
        ([beat(phase="ended")], STOPPED, {}, "stopped", "SIGTERM, saved at step 12"),
        ([beat(phase="ended")], STOPPED, {"JobState": "PENDING", "Reason": "BeginTime"}, "queued", "BeginTime"),
        ([], {}, {"JobState": "RUNNING"}, "running", "no process has spoken"),
        ([], {}, {"JobState": "FAILED", "ExitCode": "2:0"}, "failed", "exit code 2:0"),
        ([beat(age_seconds=4000.0)], {}, {}, "dead", "no sign of life for 1:06:40"),
        ([beat(age_seconds=4000.0)], {}, {"JobState": "RUNNING"}, "running", ""),
        ([beat(phase="failed", error="oh")], {}, {}, "failed", "rank 0 (host n7, pid 1), phase failed"),
        ([], {}, {}, "dead", "no sign of life"),
    ],
)
def test_live_or_dead(
    beats: list[Heartbeat], results: dict[str, Any], facts: dict[str, str], state: str, said: str
) -> None:
    found, detail = judge(beats, results, facts, begun=True)
    assert found == state and said in detail


def test_time_left_is_over_time_and_not_over_rows() -> None:
    rows = [
        {"samples_seen": 100, "perf/images_per_second": 1.0},
        {"samples_seen": 200, "perf/images_per_second": 100.0},  # 1 s
        {"samples_seen": 200, "val/top1": 0.5},
        {"samples_seen": 300, "perf/images_per_second": 10.0},  # 10 s
    ]
    assert seconds_left(rows, 500) == pytest.approx(200 * 11 / 200)
    assert seconds_left(rows[:1], 500) == pytest.approx(400)
    assert seconds_left(rows, 300) == 0
    assert seconds_left([{"samples_seen": 1, "val/top1": 0.5}], 500) is None


@pytest.mark.slow
def test_a_real_run_while_it_lives_when_it_is_killed_and_when_it_is_complete(tmp_path: Path, stripes_set: Path) -> None:
    run = tmp_path / "run"
    flags = ("--data", stripes_set, "--output", run, "--threads", "1", "--wandb-mode", "disabled", "--log-every", "1")
    train = python("-m", "distcnn", "train", *flags, "--global-batch-size", "32", "--epochs", "30", "--eval-every", "9")
    process = subprocess.Popen(
        [str(word) for word in train], env=clean_environment(), stdout=subprocess.DEVNULL, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 90
        while not (run / "checkpoints" / "latest").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        alive = look(run)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert alive.state == "running" and alive.alive, alive
    assert " of 90 (epoch " in alive.rows["step"] and alive.rows["left"].startswith("about ")
    assert look(run).state == "dead"
    assert command([str(word) for word in train], tmp_path).code == 0
    done = look(run)
    assert (done.state, done.rows["step"]) == ("complete", "90 of 90 (epoch 30 of 30), 100.00 %")
    assert done.rows["checkpoint"].startswith("step 90, ")
    (run / "logs" / "slurm.jsonl").write_text(json.dumps({"job": "4711", "time": time.time() - 60}) + "\n")
    printed = command(python("-m", "distcnn", "status", run), tmp_path)
    assert printed.code == 0 and f"{run}: complete" in printed.out and "job        4711 " in printed.out


def test_rows_of_others_in_the_metrics_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert "step" not in look(tmp_path).rows
    rows = [
        {"step": 7, "epoch": 1, "samples_seen": 99, "val/top1": 0.5},
        {"note": "by hand"},
        {"step": "x", "epoch": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look(tmp_path).rows
    assert found["step"].startswith("7 ") and found["top-1"] == "50.00 %"


def test_where_the_time_went(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "logs").mkdir()
    for rank, data in enumerate((1.0, 5.0)):
        row = {"at": 1.0, "size": 2, "data": data, "augment": 0.0, "compute": 9.0 - data, "reduce": 1.0}
        (tmp_path / "logs" / f"times_{rank}.jsonl").write_text(json.dumps(row) + "\n")
    said = look(tmp_path).rows["time"]
    assert said == "data 30%, augment 0%, compute 60%, reduce 10%; data at most 50%, of rank 1"


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        look(tmp_path)
    assert command(python("-m", "distcnn", "status"), tmp_path).errors == [
        "distcnn status: error: no run in runs/: name a run folder"
    ]
