"""Ends a run in which nothing moves any more, and says which rank is to blame.

Where one rank hangs, all others wait for it in a collective operation, until that gives up after a long time without a
name. So each rank has a thread that looks whether its own training makes progress. Only when it has made none for a
while does it read the others' heartbeats: a run that is well costs nothing. Once no rank has moved for the limit,

* a rank whose heartbeat stands still is to blame: stopped, swapped out, or its machine lost;
* else the ranks that are behind the others are, by step and phase: the others wait for them.

Phases whose length nobody knows (start, the first step with its compilation, saving, evaluation) are waited for as long
as the rank's heart beats. Time in which this process itself was stopped does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distcnn.distributed import broken_by_another
from distcnn.errors import EXIT_FAILED, LostRank, UserError
from distcnn.heartbeat import (
    BEAT_SECONDS,
    COMPUTE,
    DATA,
    ENDED,
    FAILED,
    OVER,
    PATIENT,
    REDUCE,
    REFUSED,
    STALLED,
    Beating,
    Heartbeat,
    Pulse,
    read_all,
)
from distcnn.preempt import Preempted
from distcnn.world import World

TICKS = 20  # looks within the limit
LONGEST_TICK = 5.0
SUSPICION = 0.25  # share of the limit without progress after which a rank begins to look at the others
LOOK_SECONDS = 4.0  # how long a rank whose collective operation failed looks for the one that broke it
NAMED = 4  # ranks at most in a message
_ORDER = {DATA: 0, COMPUTE: 1, REDUCE: 2}


@contextlib.contextmanager
def watched(run: Path, world: World, limit_seconds: float) -> Iterator[Pulse]:
    """Heartbeats and the watchdog of this rank, in a run folder that all ranks see. A limit of 0: heartbeats alone.

    If a collective operation fails within because another rank has died or failed, that rank is named: raises
    LostRank, or UserError with what the other rank would have said.
    """
    pulse = Pulse(world)
    beating = Beating(run, pulse, min(BEAT_SECONDS, limit_seconds / 8 or BEAT_SECONDS))
    closed = threading.Event()
    if limit_seconds:
        watch = Watch(run, pulse, limit_seconds)
        threading.Thread(target=watch.work, args=(beating, closed), name="watchdog", daemon=True).start()
    phase, text = ENDED, ""
    try:
        yield pulse
    except Preempted:
        raise
    except UserError as error:
        phase, text = REFUSED, str(error)
        raise
    except BaseException as error:
        if world.size > 1 and broken_by_another(error):
            closed.set()
            blame(run, pulse, error)
        phase, text = FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        closed.set()
        beating.close(phase, text)


def blame(run: Path, pulse: Pulse, error: BaseException) -> None:
    """A collective operation has failed: raises what became of the rank that broke it, if that can be found out."""
    world = pulse.world
    first = {beat.rank: beat.beat for beat in read_all(run)}
    until = time.monotonic() + LOOK_SECONDS
    over = False
    while not over:
        over = time.monotonic() > until
        others = [beat for beat in read_all(run) if beat.rank != world.rank]
        for beat in others:
            if beat.phase == REFUSED:
                raise UserError(beat.error, speaks=world.is_main) from error
            if beat.phase == STALLED:
                raise LostRank(beat.error) from error
        failed = [beat for beat in others if beat.phase == FAILED]
        running = [beat for beat in others if beat.phase not in OVER]
        dead = [beat for beat in running if beat.has_died()]
        still = [beat for beat in running if over and beat.beat == first.get(beat.rank)]
        lost = failed or dead or still
        if lost:
            what = "failed" if failed else "died" if dead else "gives no sign of life"
            names = "; ".join(f"{beat.who()}, {beat.error or f'last seen in {beat.place()}'}" for beat in lost[:NAMED])
            here = pulse.heartbeat(0).place(samples=False)
            text = f"lost a process of this run, which {what}: {names} (rank {world.rank} was in {here})"
            raise LostRank(text, _speaks(world, lost)) from error
        time.sleep(0.1)


def _speaks(world: World, lost: Sequence[Heartbeat]) -> bool:
    """Whether this rank is the first that is not lost."""
    gone = {beat.rank for beat in lost}
    return world.rank == next((rank for rank in range(world.size) if rank not in gone), 0)


@dataclass
class Silence:
    """For how long a rank's heartbeat and its progress have not changed, in seconds of watching."""

    last: Heartbeat
    beat_seconds: float = 0.0
    progress_seconds: float = 0.0

    def look(self, now: Heartbeat, seconds: float) -> None:
        self.beat_seconds = 0.0 if now.beat != self.last.beat else self.beat_seconds + seconds
        self.progress_seconds = 0.0 if now.progress != self.last.progress else self.progress_seconds + seconds
        self.last = now


class Watch:
    """What one rank knows of the others' silence."""

    def __init__(self, run: Path, pulse: Pulse, limit_seconds: float) -> None:
        self._run, self._pulse, self._limit = run, pulse, limit_seconds
        self._progress, self._still = -1, 0.0  # my own, and for how long it has not changed
        self._others: dict[int, Silence] = {}

    @property
    def tick_seconds(self) -> float:
        return min(self._limit / TICKS, LONGEST_TICK)

    def work(self, beating: Beating, closed: threading.Event) -> None:
        """Look until closed; if the run stalls, say so and end the process."""
        before = time.monotonic()
        while not closed.wait(self.tick_seconds):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self.tick_seconds), now
            lost = self.look(passed, beating.writes)
            if lost and not closed.is_set():
                self._end(lost, beating)

    def look(self, seconds: float, writes: bool) -> list[Heartbeat]:
        """`seconds` have passed since the last look. Returns the heartbeats of the ranks to blame, [] if all is well.

        `writes`: whether this rank's own heartbeats reach the folder; if not, the others' may not either.
        """
        mine = self._pulse.progress
        self._still = 0.0 if mine != self._progress else self._still + seconds
        self._progress = mine
        if not self._still:
            self._others.clear()
        if self._still < SUSPICION * self._limit or not writes:
            return []
        for beat in read_all(self._run):
            if beat.rank != self._pulse.world.rank:
                self._others.setdefault(beat.rank, Silence(beat)).look(beat, seconds)
        if self._still < self._limit:
            return []
        return to_blame(self._pulse, list(self._others.values()), self._limit)

    def _end(self, lost: Sequence[Heartbeat], beating: Beating) -> None:
        """Say who is to blame and leave. The first rank that is not to blame speaks, the others give it time to."""
        world = self._pulse.world
        text = verdict_text(lost, self._pulse.heartbeat(0), self._limit)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {text}\n"
        own_log = self._run / "logs" / f"rank_{world.rank}.log"
        with contextlib.suppress(OSError), own_log.open("a", encoding="utf-8") as log:
            log.write(line)
            log.flush()
            faulthandler.dump_traceback(log)
        if _speaks(world, lost):
            print(f"distcnn train: error: {text}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError), (self._run / "log.txt").open("a", encoding="utf-8") as log:
                log.write(line)
        else:
            time.sleep(2 * self.tick_seconds + 1)
        beating.close(STALLED, text)
        os._exit(EXIT_FAILED)


def to_blame(pulse: Pulse, others: Sequence[Silence], limit_seconds: float) -> list[Heartbeat]:
    """The ranks that a run, in which this rank has made no progress for the limit, waits for. [] if it may wait."""
    mine = pulse.heartbeat(0)
    running = [silence for silence in others if silence.last.phase not in OVER]
    long = limit_seconds / 2  # of watching, which began after SUSPICION
    if any(silence.progress_seconds < long for silence in running):
        return []
    silent = [silence.last for silence in running if silence.beat_seconds >= long]
    if silent:
        return silent
    everyone = [mine, *(silence.last for silence in running)]
    if any(beat.phase in PATIENT or not beat.made for beat in everyone):
        return []
    first = min((beat.total, _ORDER[beat.phase]) for beat in everyone)
    return [beat for beat in everyone if (beat.total, _ORDER[beat.phase]) == first]


def verdict_text(lost: Sequence[Heartbeat], mine: Heartbeat, limit_seconds: float) -> str:
    """The one line that is said. A heartbeat may be a moment older than what it tells of, so `mine` is told, too."""
    names = "; ".join(f"{beat.who()}, last seen in {beat.place()}" for beat in lost[:NAMED])
    if len(lost) > NAMED:
        names += f"; and {len(lost) - NAMED} more"
    if len(lost) == mine.size > 1:
        names = f"all ranks alike: {lost[0].place()}"
    return (
        f"no progress for {limit_seconds:g} s (--stall-timeout), waiting for {names}; rank {mine.rank} was in"
        f" {mine.place(samples=False)} and ends; the same command goes on from the last checkpoint"
    )
