"""The same function over many jobs, in processes, with a progress bar that says how long it will take.

Processes, since reading headers and hashing small images is mostly Python; spawned, not forked, since a fork beside
running threads may deadlock.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from distcnn.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 15.0  # in a log file, where no bar can be drawn


def usable_cpus() -> int:
    """Cores that this process may use: a SLURM or container limit counts, unlike with os.cpu_count."""
    return len(os.sched_getaffinity(0))


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    title: str,
    weights: Sequence[int] = (),
    workers: int = 0,
) -> list[Result]:
    """`function` of each job, in the order of the jobs. Both must be picklable; what `function` raises ends the run.

    `weights` say how much of the work each job is (default 1 each); `workers` 0 = one a core. Few jobs run here.
    Raises UserError where a worker was killed from outside.
    """
    amounts = list(weights) or [1] * len(jobs)
    workers = min(workers or usable_cpus(), len(jobs))
    results: dict[int, Result] = {}
    with progress(title, sum(amounts)) as advance:
        for place, result in _one_by_one(function, jobs) if workers <= 1 else _pooled(function, jobs, workers):
            results[place] = result
            advance(amounts[place])
    return [results[place] for place in range(len(jobs))]


def _one_by_one(function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
    with warnings.catch_warnings():
        _quiet()
        for place, job in enumerate(jobs):
            yield place, function(job)


def _pooled(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Result]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_quiet) as pool:
        places = {pool.submit(function, job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed (lack of memory?): try fewer --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _quiet() -> None:
    """Pillow warns of odd metadata in images; what matters is raised."""
    warnings.simplefilter("ignore")


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """`advance(amount)`: a bar with the time left on a terminal, else a line on stderr every now and then."""
    if not sys.stderr.isatty():
        yield _line_now_and_then(title, total)
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)


def _line_now_and_then(title: str, total: int) -> Callable[[int], None]:
    begun = last = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            left = math.ceil((now - begun) / done * (total - done))
            print(f"{title}: {done} of {total}, {left} s left", file=sys.stderr, flush=True)

    return advance
