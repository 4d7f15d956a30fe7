"""Rows 1, 2 and 6: killed without warning, at any moment; the launchers' part is in test_launchers.py and chaos.py."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from distcnn.checkpoint import newest_whole, step_of
from distcnn.errors import EXIT_FAILED, EXIT_USAGE
from distcnn.starts import MAX_STARTS, STARTS
from tests.faults.ranks import Ranks, at_step, finish
from tests.faults.runs import assert_same, flags

SIGKILL = int(signal.SIGKILL)
KILLED = -SIGKILL


def test_the_ranks_that_are_left_name_the_one_that_was_killed_and_the_run_goes_on(
    images: Path, tmp_path: Path, reference: Path
) -> None:
    """First one that is not rank 0, then rank 0, whose place as speaker another takes."""
    run = tmp_path / "run"
    words = flags(images, run, "--checkpoint-every", "2")
    with Ranks(tmp_path / "a", 4, words, {1: [("signal_self", {"step": 9, "number": SIGKILL})]}) as ranks:
        assert ranks.wait() == [EXIT_FAILED, KILLED, EXIT_FAILED, EXIT_FAILED]
        said = ranks.err(0)
        who = f"rank 1 (host {socket.gethostname()}, pid {ranks.processes[1].pid})"
        assert f"lost a process of this run, which died: {who}, last seen in phase " in said
        assert "(rank 0 was in phase reduce, epoch 2, step 3 (9 made))" in said and "Traceback" not in said
        assert ranks.err(2) == ranks.err(3) == "", "one rank speaks"
    with Ranks(tmp_path / "b", 2, words, {0: [("signal_self", {"step": 15, "number": SIGKILL})]}) as ranks:
        assert ranks.wait() == [KILLED, EXIT_FAILED]
        assert "which died: rank 0 " in ranks.err(1)
    assert finish(tmp_path / "c", 2, words) == [0, 0]
    assert_same(run, reference)


@pytest.mark.parametrize(
    ("user", "code", "said"),
    [
        (True, EXIT_USAGE, "distcnn train: error: shard x.tar is gone\n"),
        (False, EXIT_FAILED, "lost a process of this run, which failed: rank 1 ("),
    ],
)
def test_an_error_on_one_rank_is_said_by_rank_0(images: Path, tmp_path: Path, user: bool, code: int, said: str) -> None:
    faults = {1: [("raise_error", {"step": 3, "user": user})]}
    with Ranks(tmp_path / "a", 2, flags(images, tmp_path / "run"), faults) as ranks:
        codes = ranks.wait()
        assert codes[0] == code and codes[1] == (EXIT_USAGE if user else 1)
        assert said in ranks.err(0) and "Traceback" not in ranks.err(0)
        assert ("ZeroDivisionError: a defect" in ranks.err(0)) is not user
        assert ("ZeroDivisionError: a defect" in ranks.err(1)) is not user, "its own trace is its own"


def test_killed_while_a_checkpoint_is_written(images: Path, tmp_path: Path, reference: Path) -> None:
    """The half-written one is ignored and cleared away; so it is between the two renames of a step saved again."""
    run = tmp_path / "run"
    words = flags(images, run, "--checkpoint-every", "4")
    whole = str(run / "checkpoints" / "step_00000008")
    crash = ("signal_self", {"step": 9, "number": SIGKILL, "once_there_is": whole})
    with Ranks(tmp_path / "a", 1, words, {0: [crash]}) as ranks:
        assert ranks.wait() == [KILLED]
    with Ranks(tmp_path / "b", 1, words, {0: [("slow_saves", {"seconds": 1000})]}) as ranks:
        ranks.until(lambda: list((run / "checkpoints").glob(".tmp-step_*/manifest.json")))
        ranks.kill(0, signal.SIGKILL)
        assert ranks.wait() == [KILLED]
    partial = next((run / "checkpoints").glob(".tmp-step_*"))
    found, complaints = newest_whole(run)
    assert found is not None and step_of(found) == 8 and not complaints
    (found.parent / f".old-{found.name}").mkdir()  # as if killed after the second rename of an earlier save
    found.rename(found.parent / ".old-step_00000099")  # and as if killed between the renames
    (found.parent / ".old-step_00000099").rename(found.parent / f".old-{found.name}")
    assert not found.exists() and newest_whole(run)[0] == found
    assert finish(tmp_path / "c", 1, words) == [0]
    assert not partial.exists()
    assert_same(run, reference)


def test_a_crash_at_the_same_step_again_and_again_ends_the_restarts(images: Path, tmp_path: Path) -> None:
    """It says where, with an exit code that no launch script retries; a new checkpoint counts as progress."""
    run = tmp_path / "run"
    words = flags(images, run, "--epochs", "2")
    whole = str(run / "checkpoints" / "step_00000006")
    for step, there_is in ((3, ""), *[(8, whole)] * (MAX_STARTS + 1)):  # the first from nothing, as the second
        crash = ("signal_self", {"step": step, "number": SIGKILL, "once_there_is": there_is})
        with Ranks(tmp_path / "a", 1, words, {0: [crash]}) as ranks:
            assert ranks.wait() == [KILLED]
    with Ranks(tmp_path / "b", 1, words) as ranks:
        assert ranks.wait() == [EXIT_USAGE]
        (line,) = ranks.err().splitlines()
    assert f"started {MAX_STARTS} times from step 6 and has ended each time before a new checkpoint" in line
    assert ", the last time in phase " in line and f"delete {run / STARTS}" in line
    assert json.loads((run / STARTS).read_text()) == {"step": 6, "starts": MAX_STARTS}
    (run / STARTS).unlink()
    assert finish(tmp_path / "c", 1, words) == [0]
    assert not (run / STARTS).exists()


def test_what_the_user_ends_or_mends_is_not_counted(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = flags(images, run, "--epochs", "1")
    slow = {0: [("slow_steps", {"seconds": 0.05})]}
    with Ranks(tmp_path / "a", 1, words, slow) as ranks:
        ranks.until(at_step(run, 1))
        assert json.loads((run / STARTS).read_text()) == {"step": 0, "starts": 1}
        ranks.kill(0, signal.SIGINT)
        ranks.wait()
    assert not (run / STARTS).exists()
    with Ranks(tmp_path / "b", 1, words, {0: [("raise_error", {"step": 4, "user": True})]}) as ranks:
        assert ranks.wait() == [EXIT_USAGE]
    assert not (run / STARTS).exists()
