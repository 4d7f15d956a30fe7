"""Heartbeats: each rank says about once a second, in a file of its own, that it lives, what it does and how far it is.

`Pulse` is what the training loop holds: `mark` notes a phase, in less than a microsecond. A daemon thread writes
logs/heartbeat_<rank>.json: in place, since a file that is replaced needs free space on the disk, and without fsync,
since it is worth nothing after a crash of the machine. What a reader finds half written it reads again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distcnn.data.order import Ids
from distcnn.state import Position
from distcnn.world import World

if TYPE_CHECKING:  # `distcnn status` reads heartbeats without importing torch
    from distcnn.data.loader import TileRequest

# What a rank may be doing. In a step they follow each other as listed: data, compute, reduce.
START, DATA, COMPUTE, REDUCE = "start", "data", "compute", "reduce"
SAVE, EVALUATE, FINISH = "save", "evaluate", "finish"
ENDED, FAILED, REFUSED, STALLED = "ended", "failed", "refused", "stalled"
OVER = (ENDED, FAILED, REFUSED, STALLED)  # how a process leaves: well, by a crash, by an error of the user, by a stall
PATIENT = (START, SAVE, EVALUATE, FINISH)  # phases whose length nobody knows beforehand

BEAT_SECONDS = 1.0
_BYTES = 4096  # of a file, written at once; more only for very long names
_TEXT = 200  # characters kept of a key or a shard's name
_SHARDS = 3  # named at most


@dataclass(frozen=True)
class Heartbeat:
    """What a rank said last. `position` counts from 0: `step` within `epoch`, `total` over the run."""

    rank: int
    size: int
    pid: int
    host: str
    boot: str  # which start of the machine `at` counts from
    at: float  # seconds of that machine's monotonic clock
    beat: int  # how often it has said something
    progress: int  # how many phases it has begun: stands still if the rank hangs, though its thread goes on
    phase: str
    phase_seconds: float  # that the phase had lasted
    epoch: int
    step: int
    total: int
    made: int  # steps made by this process
    shards: tuple[str, ...]  # of the rank's samples of the step under way, some of them
    key: str  # the first of these samples
    error: str  # why it ended, if not well
    age_seconds: float = 0.0  # when read: since it was written

    def place(self, samples: bool = True) -> str:
        """Where the rank was: `phase data, epoch 2, step 17 (113 made), shard x.tar, first key '0042'`."""
        text = f"phase {self.phase}, epoch {self.epoch + 1}, step {self.step} ({self.total} made)"
        if samples and self.shards and self.phase in (DATA, COMPUTE, REDUCE):
            text += f", shard {', '.join(self.shards)}, first key {self.key!r}"
        return text

    def who(self) -> str:
        """`rank 3 (host n7, pid 4711)`."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def is_here(self) -> bool:
        """Whether it is a process of this machine, since it was last started."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def has_died(self) -> bool:
        """Whether the process is known to be gone; False where that cannot be seen from this machine."""
        if not self.is_here():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        except OSError:
            return True
        return state.split()[0] in "ZX"


class Names(Protocol):
    """What knows samples by name, such as a SplitReader."""

    def keys(self, ids: Ids) -> list[tuple[str, str]]:
        """(shard, key) of each id."""


class Pulse:
    """What a rank is doing, noted by the training loop and read by the threads of this file and of watchdog.py."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.phase, self.progress, self.made = START, 0, 0
        self.position = Position()
        self.error = ""
        self._since = time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._begun: deque[list[TileRequest]] = deque()  # steps handed to the loader and not made yet
        self._reader: Names | None = None

    def mark(self, phase: str, position: Position | None = None) -> None:
        """A phase begins."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self._since
        self._since, self.phase = now, phase
        self.position = position or self.position
        self.progress += 1

    def follow(self, requests: Iterable[list[TileRequest]], reader: Names) -> Iterator[list[TileRequest]]:
        """Pass on the requests of an epoch's steps, remembering which are under way."""
        self._begun.clear()
        self._reader = reader
        for step in requests:
            self._begun.append(step)
            yield step

    def step_made(self, position: Position) -> None:
        """A step has ended; the next one waits for its data."""
        if self._begun:
            self._begun.popleft()
        self.made += 1
        self.mark(DATA, position)

    def take_seconds(self) -> tuple[float, float]:
        """(waiting for data, computing), in seconds since the last call, without waiting for other ranks."""
        self.mark(self.phase)
        data, compute = self._seconds.pop(DATA, 0.0), self._seconds.pop(COMPUTE, 0.0)
        self._taken[DATA] += data
        self._taken[COMPUTE] += compute
        return data, compute

    def all_seconds(self) -> dict[str, float]:
        """Seconds of each phase of a step, of this process until now."""
        self.mark(self.phase)
        return {phase: self._seconds[phase] + self._taken[phase] for phase in (DATA, COMPUTE, REDUCE)}

    def heartbeat(self, beat: int) -> Heartbeat:
        """What there is to say now."""
        shards, key = self._under_way()
        at = self.position
        return Heartbeat(
            rank=self.world.rank,
            size=self.world.size,
            pid=os.getpid(),
            host=socket.gethostname(),
            boot=_boot(),
            at=time.monotonic(),
            beat=beat,
            progress=self.progress,
            phase=self.phase,
            phase_seconds=round(time.monotonic() - self._since, 3),
            epoch=at.epoch,
            step=at.step,
            total=at.total,
            made=self.made,
            shards=shards,
            key=key,
            error=self.error,
        )

    def _under_way(self) -> tuple[tuple[str, ...], str]:
        """(shards, first key) of this rank's samples of the first step that is not made yet."""
        with contextlib.suppress(IndexError, OSError):
            tiles, reader = self._begun[0], self._reader
            ids = [tile.ids[:1] for tile in tiles if len(tile.ids)]
            if ids and reader is not None:
                names = [reader.keys(first)[0] for first in ids]
                shards = list(dict.fromkeys(shard for shard, _ in names))[:_SHARDS]
                return tuple(_short(shard) for shard in shards), _short(names[0][1])
        return (), ""


class Beating:
    """The thread that writes a rank's heartbeats until it is closed."""

    def __init__(self, run: Path, pulse: Pulse, seconds: float = BEAT_SECONDS) -> None:
        self.writes = True  # whether the last one could be written
        self._path = path_of(run, pulse.world.rank)
        self._pulse, self._seconds, self._beat = pulse, seconds, 0
        self._closed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, phase: str, error: str = "") -> None:
        """Say how it ended, and end."""
        self._closed.set()
        self._thread.join(self._seconds + 1)
        self._pulse.error = error
        self._pulse.mark(phase)
        self._write()

    def _work(self) -> None:
        while not self._closed.wait(self._seconds):
            self._write()

    def _write(self) -> None:
        self._beat += 1
        row = dataclasses.asdict(self._pulse.heartbeat(self._beat))
        del row["age_seconds"]
        data = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").ljust(_BYTES - 1) + b"\n"
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)  # opened each time: so NFS hands it on at once
            try:
                self.writes = os.pwrite(file, data, 0) == len(data)
                os.ftruncate(file, len(data))
            finally:
                os.close(file)
        except OSError:
            self.writes = False


def path_of(run: Path, rank: int) -> Path:
    """The file of a rank's heartbeats."""
    return run / "logs" / f"heartbeat_{rank}.json"


def read_all(run: Path) -> list[Heartbeat]:
    """What the ranks of a run said last, by rank. What cannot be read is left out; [] if there is nothing.

    `age_seconds` is exact for processes of this machine (by its monotonic clock); for others it is the age of the
    file by this machine's clock, and so as good as the clocks of the two machines agree.
    """
    found = [_read(path) for path in (run / "logs").glob("heartbeat_*.json")]
    return sorted((beat for beat in found if beat is not None), key=lambda beat: beat.rank)


def clear(run: Path) -> None:
    """Remove the heartbeats of an earlier start; rank 0 calls it before the others begin."""
    for path in (run / "logs").glob("heartbeat_*.json"):
        path.unlink(missing_ok=True)


def _read(path: Path) -> Heartbeat | None:
    for _ in range(3):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime
            row: dict[str, Any] = json.loads(text)
            beat = Heartbeat(**{**row, "shards": tuple(row["shards"])})
            now = time.monotonic() - beat.at if beat.is_here() else time.time() - written
            return dataclasses.replace(beat, age_seconds=max(now, 0.0))
    return None


def _short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _TEXT else text[: _TEXT - 3] + "..."


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
