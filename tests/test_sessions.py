from __future__ import annotations

import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

from distcnn import sessions
from distcnn.heartbeat import COMPUTE, ENDED, Beating, Pulse, clear
from distcnn.runfolder import METRICS, append_row
from distcnn.sessions import SESSIONS, git_state, note_end, read_sessions, start_row
from distcnn.state import Position
from distcnn.world import World
from tests.harness import simulate, small_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def beat(run: Path, total: int, rank: int = 0) -> None:
    """A rank's last sign of life."""
    pulse = Pulse(World(rank, 2, rank, 2))
    pulse.mark(COMPUTE, Position(0, total, total, 8 * total))
    Beating(run, pulse, 10).close(ENDED)


def test_what_was_lost_between_two_starts(run: Path) -> None:
    assert read_sessions(run) == []
    note_end(run)
    assert not (run / SESSIONS).exists()
    append_row(run / SESSIONS, start_row(0, 0, 2, {"git": {"commit": "abc"}}))
    assert read_sessions(run)[0].reached is None, "no heartbeat yet"
    beat(run, 17)
    beat(run, 18, rank=1)
    note_end(run)
    note_end(run)  # of a start that came to nothing
    clear(run)
    append_row(run / SESSIONS, start_row(10, 1, 4, {}))
    beat(run, 29)
    append_row(run / METRICS, {"step": 30})  # heartbeats are a second old, rows are not
    first, second = read_sessions(run)
    assert (first.step, first.reached, first.world_size, first.facts) == (0, 18, 2, {"git": {"commit": "abc"}})
    assert (second.step, second.reached, second.epoch, second.world_size) == (10, 30, 1, 4)
    assert first.lost(second) == 8
    times = [first.begin, first.end or 0, second.begin, second.end or 0, time.time()]
    assert all(after > before - 0.1 for before, after in pairwise(times)), "files' times are not exact"


@pytest.mark.parametrize("row", [{}, {"kind": "end", "time": 1, "step": 2}, {"kind": "start"}, {"kind": "x"}])
def test_rows_that_make_no_sense_are_left_out(run: Path, row: dict[str, object]) -> None:
    append_row(run / SESSIONS, row)
    append_row(run / SESSIONS, start_row(3, 0, 1, {}))
    assert [session.step for session in read_sessions(run)] == [3]


def test_a_run_notes_its_starts(stripes_set: Path, tmp_path: Path) -> None:
    simulate(small_config(stripes_set, tmp_path / "run"), 2)
    (session,) = read_sessions(tmp_path / "run")
    assert (session.step, session.world_size) == (0, 2)
    assert len(session.facts["fingerprint"]) == 64 and session.facts["samples"] == {"train": 67, "val": 37}
    assert session.facts["parameters"] > 100 and "torch" in session.facts["versions"]


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the current folder, where the package is not a checkout."""
    outside = tmp_path / "site-packages"
    outside.mkdir()
    monkeypatch.setattr(sessions, "__file__", str(outside / "sessions.py"))
    monkeypatch.chdir(outside)
    assert git_state() == {}
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    git(work, "init", "-q")
    assert git_state() == {}, "nothing is committed"
    (work / "a.py").write_text("1")
    git(work, "add", "a.py")
    git(work, "commit", "-qm", "x")
    commit = git(work, "rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "changed": False}
    (work / "new.py").write_text("untracked files are not changes")
    assert git_state() == {"commit": commit, "changed": False}
    (work / "a.py").write_text("2")
    assert git_state() == {"commit": commit, "changed": True}


def test_no_git_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {}
