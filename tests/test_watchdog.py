"""The judgement alone; processes that really hang and die are in faults/test_stall.py and faults/test_kill.py."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distcnn.errors import LostRank, UserError
from distcnn.heartbeat import (
    COMPUTE,
    DATA,
    ENDED,
    EVALUATE,
    FAILED,
    REDUCE,
    REFUSED,
    SAVE,
    STALLED,
    START,
    Beating,
    Heartbeat,
    Pulse,
)
from distcnn.state import Position
from distcnn.watchdog import NAMED, Silence, Watch, blame, to_blame, verdict_text, watched
from distcnn.world import World

LIMIT = 10.0


def pulse_of(rank: int, size: int, phase: str, total: int, made: int = 9) -> Pulse:
    pulse = Pulse(World(rank, size, rank, size))
    pulse.mark(phase, Position(0, total, total, 0))
    pulse.made = made
    return pulse


def silence(rank: int, phase: str, total: int, beats: bool = True, moves: bool = False, made: int = 9) -> Silence:
    """Rank `rank` of 4, watched for the limit: whether its heart has beaten, whether it has got on."""
    beat = pulse_of(rank, 4, phase, total, made).heartbeat(1)
    return Silence(beat, 0.0 if beats else LIMIT, 0.0 if moves else LIMIT)


@pytest.mark.parametrize(
    ("mine", "others", "blamed"),
    [
        # who waits is in `reduce`, or a step further: to blame are those behind
        ((REDUCE, 5), [(1, REDUCE, 5), (2, DATA, 5), (3, REDUCE, 5)], [2]),
        ((REDUCE, 5), [(1, COMPUTE, 5), (2, REDUCE, 5), (3, COMPUTE, 5)], [1, 3]),
        ((DATA, 6), [(1, REDUCE, 5), (2, DATA, 6), (3, DATA, 6)], [1]),
        ((DATA, 5), [(1, REDUCE, 5), (2, REDUCE, 5), (3, REDUCE, 5)], [0]),
        ((REDUCE, 5), [(1, REDUCE, 5), (2, REDUCE, 5), (3, REDUCE, 5)], [0, 1, 2, 3]),
    ],
)
def test_hearts_beat_and_nobody_moves(
    mine: tuple[str, int], others: list[tuple[int, str, int]], blamed: list[int]
) -> None:
    found = to_blame(pulse_of(0, 4, *mine), [silence(*other) for other in others], LIMIT)
    assert [beat.rank for beat in found] == blamed


@pytest.mark.parametrize("phase", [START, SAVE, EVALUATE, DATA, REDUCE])
def test_a_heart_that_stands_still_is_to_blame_in_any_phase(phase: str) -> None:
    others = [silence(1, REDUCE, 5), silence(2, phase, 5, beats=False), silence(3, SAVE, 5)]
    assert [beat.rank for beat in to_blame(pulse_of(0, 4, REDUCE, 5), others, LIMIT)] == [2]


@pytest.mark.parametrize(
    "others",
    [
        [silence(1, DATA, 5, moves=True), silence(2, REDUCE, 5)],  # one gets on, slowly
        [silence(1, DATA, 5, beats=False, moves=True)],  # gets on, though its heartbeats come late
        [silence(1, EVALUATE, 5), silence(2, REDUCE, 5)],  # may take long
        [silence(1, SAVE, 5)],
        [silence(1, DATA, 5, made=0), silence(2, REDUCE, 5)],  # its first step: compilation
        [Silence(silence(1, DATA, 5).last, LIMIT / 3, LIMIT / 3)],  # not watched for long enough yet
    ],
)
def test_what_is_waited_for(others: list[Silence]) -> None:
    assert to_blame(pulse_of(0, 4, REDUCE, 5), others, LIMIT) == []


def test_ranks_that_have_ended_are_not_waited_for() -> None:
    others = [silence(1, ENDED, 9, beats=False), silence(2, DATA, 5)]
    assert [beat.rank for beat in to_blame(pulse_of(0, 4, REDUCE, 5), others, LIMIT)] == [2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_a_run_that_is_well_is_not_read_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr("distcnn.watchdog.read_all", lambda folder: reads.append(folder) or [])
    pulse = pulse_of(0, 2, DATA, 5)
    watch = Watch(run, pulse, LIMIT)
    for _ in range(100):
        pulse.mark(COMPUTE)
        assert watch.look(1.0, writes=True) == [] and watch.look(1.0, writes=True) == []
    assert reads == []


def test_a_stall_is_found_after_the_limit_and_not_before(run: Path) -> None:
    other = pulse_of(1, 2, DATA, 5)
    beating = Beating(run, other, 60)
    watch = Watch(run, pulse_of(0, 2, REDUCE, 5), LIMIT)
    looks = [bool(watch.look(0.5, writes=True)) for _ in range(30)]
    assert looks.index(True) == LIMIT / 0.5, "the first look only begins"
    other.mark(COMPUTE)
    beating._write()
    assert watch.look(0.5, writes=True) == [], "it gets on again"
    for _ in range(30):
        assert watch.look(0.5, writes=False) == [], "its own heartbeats do not reach the folder: it cannot judge"


def test_the_line_that_is_said() -> None:
    lost = [dataclasses.replace(pulse_of(2, 4, DATA, 5).heartbeat(0), host="n7", pid=4711, shards=("a.tar",), key="k")]
    mine = pulse_of(0, 4, REDUCE, 5).heartbeat(0)
    assert verdict_text(lost, mine, 300.0) == (
        "no progress for 300 s (--stall-timeout), waiting for rank 2 (host n7, pid 4711), last seen in phase data,"
        " epoch 1, step 5 (5 made), shard a.tar, first key 'k'; rank 0 was in phase reduce, epoch 1, step 5 (5 made)"
        " and ends; the same command goes on from the last checkpoint"
    )
    many = [pulse_of(rank, 64, DATA, 5).heartbeat(0) for rank in range(1, 64)]
    text = verdict_text(many, pulse_of(0, 64, REDUCE, 5).heartbeat(0), 300.0)
    assert text.count("rank ") == NAMED + 1 and f"; and {63 - NAMED} more;" in text
    all_alike = [pulse_of(rank, 4, REDUCE, 5).heartbeat(0) for rank in range(4)]
    assert "waiting for all ranks alike: phase reduce" in verdict_text(all_alike, mine, 300.0)


def dead() -> int:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


BROKEN = RuntimeError("gloo: Connection reset by peer")


@pytest.mark.parametrize(
    ("phase", "error", "kind", "said", "speaks"),
    [
        (REFUSED, "shard x is gone", UserError, "shard x is gone", True),
        (STALLED, "no progress for 3 s", LostRank, "no progress for 3 s", False),
        (FAILED, "ZeroDivisionError: x", LostRank, "which failed: rank 1 (host ", True),
        (REDUCE, "", LostRank, "which gives no sign of life: rank 1 (host ", True),
    ],
)
def test_what_a_rank_says_of_the_one_it_lost(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    error: str,
    kind: type[UserError],
    said: str,
    speaks: bool,
) -> None:
    monkeypatch.setattr("distcnn.watchdog.LOOK_SECONDS", 0.3)
    other = pulse_of(1, 2, phase, 5)
    other.error = error
    Beating(run, other, 60)
    with pytest.raises(kind) as caught:
        blame(run, pulse_of(0, 2, REDUCE, 5), BROKEN)
    assert said in str(caught.value) and error in str(caught.value) and caught.value.speaks is speaks
    assert type(caught.value) is kind


def test_who_speaks_when_rank_0_has_died(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = dead()
    real: Callable[..., Heartbeat] = Pulse.heartbeat

    def heartbeat(self: Pulse, beat: int) -> Heartbeat:
        return dataclasses.replace(real(self, beat), pid=os.getpid() if self.world.rank else pid)

    monkeypatch.setattr(Pulse, "heartbeat", heartbeat)
    for rank in range(3):
        Beating(run, pulse_of(rank, 3, REDUCE, 5), 60)
    speak = {}
    for rank in (1, 2):
        with pytest.raises(LostRank, match="which died: rank 0 ") as caught:
            blame(run, pulse_of(rank, 3, REDUCE, 5), BROKEN)
        speak[rank] = caught.value.speaks
    assert speak == {1: True, 2: False}


def test_an_operation_that_fails_of_itself_stays_what_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are well: there is nobody to blame."""
    monkeypatch.setattr("distcnn.watchdog.LOOK_SECONDS", 0.3)
    others = [Beating(run, pulse_of(rank, 3, REDUCE, 5), 0.05) for rank in (1, 2)]
    with pytest.raises(RuntimeError, match=r"^gloo: Connection reset"), watched(run, World(0, 3, 0, 3), 0.0):
        raise BROKEN
    for beating in others:
        beating.close(ENDED)


@pytest.mark.parametrize(
    ("error", "phase", "text"),
    [(None, ENDED, ""), (UserError("u"), REFUSED, "u"), (MemoryError("m\nn"), FAILED, "MemoryError: m")],
)
def test_how_a_rank_ended_stands_in_its_last_heartbeat(run: Path, error: Any, phase: str, text: str) -> None:
    from distcnn.heartbeat import read_all

    try:
        with watched(run, World(), 5.0) as pulse:
            pulse.mark(DATA)
            if error:
                raise error
    except (UserError, MemoryError):
        pass
    (beat,) = read_all(run)
    assert (beat.phase, beat.error) == (phase, text)
