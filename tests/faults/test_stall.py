"""Rows 7 and 8: a rank that hangs is named and the run ends; one that is slow is named and the run goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from distcnn.errors import EXIT_FAILED
from distcnn.runfolder import read_rows
from tests.faults.ranks import Ranks, finish
from tests.faults.runs import flags, results

LIMIT = 4.0


def test_a_stopped_rank_is_named_by_the_others_which_end(images: Path, tmp_path: Path) -> None:
    """Long before the collective operation's own time-out of 15 minutes."""
    run = tmp_path / "run"
    words = flags(images, run, "--stall-timeout", str(LIMIT))
    stop = [("signal_self", {"step": 8, "number": int(signal.SIGSTOP)})]
    slow = [("slow_steps", {"seconds": 0.2})]  # so that heartbeats tell of steps before the eighth
    with Ranks(tmp_path / "a", 3, words, {2: stop, -1: slow}) as ranks:
        ranks.processes[0].join(100)
        assert ranks.processes[0].exitcode == EXIT_FAILED
        ranks.processes[1].join(100)
        assert ranks.processes[1].exitcode == EXIT_FAILED and ranks.err(1) == ""
        assert ranks.processes[2].is_alive(), "it is stopped: only SIGKILL ends it, which launchers send"
        line = ranks.err(0).splitlines()[-1]
        assert f"no progress for {LIMIT:g} s (--stall-timeout), waiting for rank 2 (host " in line
        assert (
            f"pid {ranks.processes[2].pid}), last seen in phase " in line and ", shard train-000000.tar, first " in line
        )
        assert "; rank 0 was in phase reduce, epoch 2, step 2 (8 made) and ends" in line
    assert line.removeprefix("distcnn train: ") in (run / "log.txt").read_text()
    trace = (run / "logs" / "rank_0.log").read_text()
    assert "Current thread" in trace and "train_step" in trace, "where this rank stood is in its log"


def test_a_rank_whose_data_never_comes_is_named_though_its_heart_beats(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = flags(images, run, "--stall-timeout", str(LIMIT))
    with Ranks(tmp_path / "a", 2, words, {0: [("hang_in_data", {"step": 4})]}) as ranks:
        assert ranks.wait() == [EXIT_FAILED] * 2
        assert "waiting for rank 0 (host" in ranks.err(1)
        assert "phase data, epoch 1, step 4 (4 made), shard train-000000.tar, first key" in ranks.err(1)
        assert ranks.err(0) == "", "the first rank that is not to blame speaks"
    assert 'inject.py", line' in (run / "logs" / "rank_0.log").read_text(), "its own log shows the line that hangs"


def test_a_single_process_that_hangs_says_where(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = flags(images, run, "--stall-timeout", "2")
    with Ranks(tmp_path / "a", 1, words, {0: [("hang_in_data", {"step": 2})]}) as ranks:
        assert ranks.wait() == [EXIT_FAILED]
        assert "waiting for rank 0 (" in ranks.err() and "phase data, epoch 1, step 2" in ranks.err()


def test_long_starts_evaluations_and_pauses_of_all_ranks_are_no_stall(images: Path, tmp_path: Path) -> None:
    """A first step, a save and an evaluation that last longer than the limit; then a Ctrl-Z of all, and fg."""
    run = tmp_path / "run"
    words = flags(images, run, "--stall-timeout", "2", "--epochs", "1")
    faults = {-1: [("slow_first_step", {"seconds": 4.0}), ("slow_evaluation", {"seconds": 4.0})]}
    with Ranks(tmp_path / "a", 2, words, faults) as ranks:
        ranks.until(lambda: (run / "logs" / "heartbeat_1.json").exists())
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in (0, 1):
                ranks.kill(rank, number)
            time.sleep(3.0 if number == signal.SIGSTOP else 0.0)
        assert ranks.wait() == [0, 0]
        assert ranks.err(0) == ""


def test_a_slow_rank_is_named_and_the_run_goes_on(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slow = {1: [("slow_data", {"seconds": 0.06})]}
    with Ranks(tmp_path / "a", 3, flags(images, run), slow) as ranks:
        assert ranks.wait() == [0] * 3
        lines = [line for line in ranks.err(0).splitlines() if "is slow" in line]
    assert len(lines) == 1, "at most one line a minute"
    assert "rank 1 is slow: 0." in lines[0] and "mostly waiting for data" in lines[0]
    rows = [row for row in read_rows(run / "metrics.jsonl") if "perf/slowest_rank" in row]
    assert sum(row["perf/slowest_rank"] == 1 for row in rows) > 0.8 * len(rows)
    assert all(row["perf/slowest_step_seconds"] >= 0.06 for row in rows if row["perf/slowest_rank"] == 1)
    assert results(run)["status"] == "complete"
    run = tmp_path / "busy"
    assert finish(tmp_path / "b", 2, flags(images, run, "--epochs", "1"), faults={0: [("busy", {"seconds": 0.06})]})
    row = [row for row in read_rows(run / "metrics.jsonl") if "perf/slowest_rank" in row][-2]
    assert row["perf/slowest_rank"] == 0 and row["perf/slowest_step_seconds"] > row["perf/other_step_seconds"]
