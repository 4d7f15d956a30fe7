"""Starts the runs of a verification as real processes, a few at a time, and reads what they recorded. No torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distcnn.runfolder import LEDGER, METRICS, RESULTS, read_rows
from distcnn.verify.plan import Run

STILL_SECONDS = 300.0  # without a sign of life, then a run is taken to hang
LOG = "log.txt"


@dataclass(frozen=True)
class TileRow:
    """A tile that a process trained on."""

    epoch: int
    step: int
    lane: int
    ids: list[int]
    pixels: list[str]  # a digest for each sample
    labels: list[list[int]]  # label and partner's label
    share: float


@dataclass(frozen=True)
class Trace:
    """What the processes of a run recorded. Steps are counted over the whole run."""

    run: Run
    trouble: str = ""  # "" or what ended the run before its time
    seconds: float = 0.0
    ranks: list[list[dict[str, Any]]] = field(default_factory=list)

    @property
    def processes(self) -> int:
        return self.run.processes

    @cached_property
    def tiles(self) -> dict[tuple[int, int], list[TileRow]]:
        """(epoch, step) -> the tiles of all processes in the order of their lanes."""
        found: dict[tuple[int, int], list[TileRow]] = {}
        for row in self.rows("tile"):
            tile = TileRow(**{name: value for name, value in row.items() if name != "kind"})
            found.setdefault((tile.epoch, tile.step), []).append(tile)
        return {place: sorted(found[place], key=lambda tile: tile.lane) for place in sorted(found)}

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows of one kind, rank after rank."""
        return [row for rank in self.ranks for row in rank if row["kind"] == kind]

    def by_step(self, kind: str, rank: int = 0) -> dict[int, dict[str, Any]]:
        """Rows of one rank by step."""
        return {row["total"]: row for row in self.ranks[rank] if row["kind"] == kind} if self.ranks else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of training steps in metrics.jsonl; null there is a number that was not finite."""
        rows = [row for row in read_rows(self.run.config.output / METRICS) if "train/loss" in row]
        return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        return read_rows(self.run.config.output / LEDGER)

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json, {} if there is none."""
        file = self.run.config.output / RESULTS
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return found


def launch_all(runs: Sequence[Run], tell: Callable[[Trace], None]) -> dict[str, Trace]:
    """Run all, as many at a time as the cores can carry; `tell` hears of each that has ended."""
    chains = [[run, *(later for later in runs if later.after == run.name)] for run in runs if not run.after]
    traces: dict[str, Trace] = {}
    stop = threading.Event()

    def work(chain: list[Run]) -> None:
        for run in chain:
            if not stop.is_set():
                traces[run.name] = launch(run, stop)
                tell(traces[run.name])

    pool = ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)) // 2))
    try:
        for future in [pool.submit(work, chain) for chain in chains]:
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return traces


def launch(run: Run, stop: threading.Event) -> Trace:
    """Start a run with torchrun (one process: without), wait for its end, and read its trace."""
    spec = run.write()
    worker = ["-m", "distcnn.verify.worker", str(spec)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.processes}"]
    words = [sys.executable, *(torchrun if run.processes > 1 else []), *worker]
    started = time.monotonic()
    with (run.trace / LOG).open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        hung = not _wait(process, run.trace, stop)
    return read_trace(run, process.returncode, hung, time.monotonic() - started)


def _wait(process: subprocess.Popen[bytes], trace: Path, stop: threading.Event) -> bool:
    """Wait for the end of a run; False if it had to be ended."""
    size, moved = -1, time.monotonic()
    while process.poll() is None:
        now = sum(file.stat().st_size for file in trace.glob("*.jsonl")) + (trace / LOG).stat().st_size
        if now != size:
            size, moved = now, time.monotonic()
        if stop.is_set() or time.monotonic() > moved + STILL_SECONDS:
            _end(process, trace)
            return False
        time.sleep(0.05)
    return True


def _end(process: subprocess.Popen[bytes], trace: Path) -> None:
    """Kill a run: torchrun, and the workers that it has started in sessions of their own."""
    workers = [row["pid"] for rank in _read_ranks(trace) for row in rank if row["kind"] == "start"]
    for pid in [process.pid, *workers]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def read_trace(run: Run, code: int, hung: bool, seconds: float) -> Trace:
    """The trace of a run that has ended with exit code `code`, and what is wrong with its end."""
    ranks = _read_ranks(run.trace)
    kinds = {row["kind"] for rank in ranks for row in rank}
    errors = [row for rank in ranks for row in rank if row["kind"] == "error"]
    trouble = ""
    if hung:
        trouble = f"it stood still for {STILL_SECONDS:.0f} s and was ended"
    elif errors:
        trouble = str(errors[0]["text"])
    elif run.kill_at >= 0:
        if "kill" not in kinds:
            trouble = f"it did not come to step {run.kill_at}, where it was to be killed (exit code {code})"
    elif code or "end" not in kinds:
        trouble = f"exit code {code}: {_last_line(run.trace / LOG)}"
    return Trace(run, trouble, seconds, ranks)


def _read_ranks(trace: Path) -> list[list[dict[str, Any]]]:
    return [read_rows(file) for file in sorted(trace.glob("rank-*.jsonl"))]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
