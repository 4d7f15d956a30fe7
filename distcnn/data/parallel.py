"""The same function over many jobs, in processes, with a line of progress that says how long it will take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from distcnn.console import Console
from distcnn.data.prepare.pool import Pool, usable_cores

Job = TypeVar("Job")
Result = TypeVar("Result")

SILENT = Console(speaks=False)


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    title: str,
    weights: Sequence[int] = (),
    workers: int = 0,
    console: Console = SILENT,
) -> list[Result]:
    """`function` of each job, in the order of the jobs. Both must be picklable; what `function` raises ends the run.

    `weights` say how much of the work each job is (default 1 each); `workers` 0 = one a core, 1 = in this process.
    Raises UserError where a worker was killed from outside.
    """
    amounts = list(weights) or [1] * len(jobs)
    results: list[Result] = []
    with console.progress(title, sum(amounts)) as advance, Pool(min(workers or usable_cores(), len(jobs))) as pool:
        for place, result in pool.map(_quietly, ((place, (function, job)) for place, job in enumerate(jobs))):
            results.append(result)
            advance(amounts[place], "")
    return results


def _quietly(function: Callable[[Job], Result], job: Job) -> Result:
    """Pillow warns of odd metadata in images; what matters is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(job)
