"""Signals to this process; what becomes of them in a run is tried in faults/test_stop.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcnn.preempt import GRACE_SECONDS, SIGNALS, StopRequest, clear_stop_file


def soon(stop: StopRequest) -> bool:
    """Whether it is wanted within a second: a thread notes it."""
    until = time.monotonic() + 5
    while not stop.wanted() and time.monotonic() < until:
        time.sleep(0.005)
    return stop.wanted()


@pytest.fixture
def hang_up_heard() -> Iterator[None]:
    """As in a terminal, though these tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("hang_up_heard")
def test_a_signal_is_noted_and_the_handlers_of_before_come_back(tmp_path: Path, number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with StopRequest(tmp_path, looks_for_file=False) as stop:
        assert not stop.wanted()
        os.kill(os.getpid(), number)
        assert soon(stop) and stop.reason == number.name
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        assert stop.reason == number.name, "the first reason stays"
    assert {each: signal.getsignal(each) for each in SIGNALS} == before
    assert signal.set_wakeup_fd(-1) == -1, "the pipe is gone"


def test_a_run_under_nohup_does_not_end_with_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path, looks_for_file=False) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.wanted()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_limit_leaves_room_for_a_save(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, looks_for_file=False, time_limit_seconds=100)
    assert not stop.wanted(save_seconds=10) and stop.can_save(10)
    assert stop.wanted(save_seconds=60) and "--time-limit" in stop.reason
    assert not stop.can_save(101)
    assert not StopRequest(tmp_path, looks_for_file=False).wanted(1e6), "no limit"


def test_after_a_sigterm_there_is_time_for_a_short_save_only(tmp_path: Path) -> None:
    with StopRequest(tmp_path, looks_for_file=False) as stop:
        assert stop.can_save(1e6)
        stop.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert soon(stop) and stop.can_save(GRACE_SECONDS / 2) and not stop.can_save(GRACE_SECONDS)


def test_the_stop_file_is_looked_for_by_one_rank_and_cleared_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distcnn.preempt.LOOK_SECONDS", 0.01)
    file = tmp_path / "stop"
    with StopRequest(tmp_path, looks_for_file=True) as looks, StopRequest(tmp_path, looks_for_file=False) as waits:
        file.touch()
        assert soon(looks) and looks.reason == f"the file {file}" and not waits.wanted()
    assert not clear_stop_file(tmp_path, restarts=0) and not file.exists(), "left over from an earlier run"
    file.touch()
    assert clear_stop_file(tmp_path, restarts=1) and file.exists(), "written for the job that torchrun restarted"
    file.unlink()
    assert not clear_stop_file(tmp_path, restarts=1)
