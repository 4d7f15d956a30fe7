from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distcnn.data.loader import TileRequest
from distcnn.data.order import Ids
from distcnn.heartbeat import (
    COMPUTE,
    DATA,
    FAILED,
    REDUCE,
    START,
    Beating,
    Heartbeat,
    Pulse,
    clear,
    path_of,
    read_all,
)
from distcnn.state import Position
from distcnn.world import World


class Names:
    """Three samples a shard."""

    def keys(self, ids: Ids) -> list[tuple[str, str]]:
        return [(f"s{i // 3}.tar", f"k{i}") for i in ids.tolist()]


def requests(*steps: list[list[int]]) -> list[list[TileRequest]]:
    return [
        [TileRequest(0, step, lane, np.array(ids, dtype=np.int64)) for lane, ids in enumerate(tiles)]
        for step, tiles in enumerate(steps)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_what_a_rank_does_is_read_by_another_process(run: Path) -> None:
    pulse = Pulse(World(1, 3, 1, 3))
    beating = Beating(run, pulse, 0.02)
    pulse.mark(COMPUTE, Position(2, 5, 17, 999))
    time.sleep(0.2)
    (beat,) = read_all(run)
    assert (beat.rank, beat.size, beat.pid, beat.phase, beat.error) == (1, 3, os.getpid(), COMPUTE, "")
    assert (beat.epoch, beat.step, beat.total, beat.made) == (2, 5, 17, 0)
    assert beat.beat >= 3 and 0.05 < beat.phase_seconds < 5 and 0 <= beat.age_seconds < 5
    assert beat.is_here() and not beat.has_died() and beat.place() == "phase compute, epoch 3, step 5 (17 made)"
    beating.close(FAILED, "why\nelse")
    (last,) = read_all(run)
    assert (last.phase, last.error) == (FAILED, "why\nelse") and last.beat > beat.beat and last.progress > beat.progress
    time.sleep(0.1)
    assert read_all(run)[0].beat == last.beat, "it has ended"
    clear(run)
    assert read_all(run) == []


def test_the_samples_under_way_are_those_of_the_first_step_not_made(run: Path) -> None:
    """Though the loader has been handed steps ahead; empty tiles are passed over."""
    pulse = Pulse()
    ahead = pulse.follow(requests([[], [4, 5], [1], [3]], [[7], []], [[], []]), Names())
    assert pulse.heartbeat(0).shards == ()
    next(ahead)
    assert (pulse.heartbeat(0).shards, pulse.heartbeat(0).key) == (("s1.tar", "s0.tar"), "k4")
    next(ahead)
    assert pulse.heartbeat(0).key == "k4"
    pulse.step_made(Position(0, 1, 1, 3))
    beat = pulse.heartbeat(0)
    assert (beat.shards, beat.key, beat.phase, beat.made, beat.total) == (("s2.tar",), "k7", DATA, 1, 1)
    assert beat.place() == "phase data, epoch 1, step 1 (1 made), shard s2.tar, first key 'k7'"
    next(ahead)
    pulse.step_made(Position(0, 2, 2, 4))
    assert pulse.heartbeat(0).shards == () and pulse.heartbeat(0).key == ""


def test_seconds_by_phase() -> None:
    pulse = Pulse()
    for phase, seconds in ((DATA, 0.04), (COMPUTE, 0.02), (DATA, 0.02), (REDUCE, 0.05)):
        pulse.mark(phase)
        time.sleep(seconds)
    data, compute = pulse.take_seconds()
    assert 0.055 < data < 0.5 and 0.015 < compute < 0.4
    assert pulse.take_seconds() == (0.0, 0.0)
    assert pulse.phase == REDUCE, "reading does not change the phase"


def test_ugly_names_fit_in_the_file(run: Path) -> None:
    class Ugly(Names):
        def keys(self, ids: Ids) -> list[tuple[str, str]]:
            return [("\udcff" * 1000 + str(i), '"\n\x00ä' * 1000) for i in ids.tolist()]

    pulse = Pulse()
    next(pulse.follow(requests([[n] for n in range(5)]), Ugly()))
    beating = Beating(run, pulse, 60)
    (beat,) = read_all(run)
    assert len(beat.shards) == 3 and all(len(text) <= 1000 for text in (*beat.shards, beat.key))
    beating.close(FAILED, "x" * 5000)
    assert read_all(run)[0].error == "x" * 5000
    pulse._begun.clear()
    beating.close(FAILED, "short")
    assert read_all(run)[0].error == "short", "nothing is left of the longer text"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"rank": 1}', "\x00" * 4096])
def test_files_that_are_none_are_left_out(run: Path, text: str) -> None:
    Beating(run, Pulse(World(0, 2)), 60)
    path_of(run, 1).write_text(text)
    assert [beat.rank for beat in read_all(run)] == [0]


def beat_of(**changes: object) -> Heartbeat:
    return dataclasses.replace(Pulse().heartbeat(1), **changes)  # type: ignore[arg-type]


def test_who_has_died_is_known_on_this_machine_only() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert beat_of(pid=child.pid).has_died()
    assert not beat_of(pid=child.pid, host="another").has_died(), "nobody knows from here"
    assert not beat_of(pid=child.pid, boot="another").has_died()
    zombie = subprocess.Popen([sys.executable, "-c", "pass"])
    until = time.monotonic() + 20
    while not beat_of(pid=zombie.pid).has_died() and time.monotonic() < until:
        time.sleep(0.01)  # it has ended, and nobody has asked for its exit code
    assert beat_of(pid=zombie.pid).has_died()
    zombie.wait()
    assert not beat_of().has_died() and beat_of().phase == START


def test_the_age_on_another_machine_is_that_of_the_file(run: Path) -> None:
    beating = Beating(run, Pulse(), 60)
    row = json.loads(path_of(run, 0).read_text())
    path_of(run, 0).write_text(json.dumps(row | {"host": "another", "at": 0}))
    os.utime(path_of(run, 0), (time.time() - 100, time.time() - 100))
    assert 99 < read_all(run)[0].age_seconds < 130
    beating.close(FAILED)


def test_a_folder_that_is_gone_ends_nothing(run: Path) -> None:
    pulse = Pulse()
    beating = Beating(run, pulse, 0.01)
    assert beating.writes
    path_of(run, 0).unlink()
    (run / "logs").rmdir()
    time.sleep(0.1)
    assert not beating.writes
    (run / "logs").mkdir()
    time.sleep(0.1)
    assert beating.writes and read_all(run)


def test_reading_needs_no_torch() -> None:
    code = "import sys, distcnn.heartbeat; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
