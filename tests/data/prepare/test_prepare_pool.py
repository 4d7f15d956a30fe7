from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool_tasks import die, eat, fail, slow_first
from prepare_files import processes_of, wait_for

from distcnn.data.prepare.pool import Pool, usable_cores
from distcnn.errors import UserError

IDLE = """
import time
from distcnn.data.prepare.pool import Pool
if __name__ == "__main__":
    with Pool(3) as pool:
        print(len(list(pool.map(abs, iter([(i, (-i,)) for i in range(50)])))), flush=True)
        time.sleep(600)
"""


def numbers(n: int) -> Iterator[tuple[str, tuple[int]]]:
    return ((f"tag{i}", (-i,)) for i in range(n))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order_with_a_bounded_number_under_way(workers: int) -> None:
    drawn = 0

    def counted() -> Iterator[tuple[int, tuple[int]]]:
        nonlocal drawn
        for i in range(40):
            drawn += 1
            yield i, (i,)

    got = []
    with Pool(workers) as pool:
        for tag, result in pool.map(slow_first, counted()):
            assert drawn <= len(got) + 2 * workers + 1
            got.append((tag, result))
    assert got == [(i, i * i) for i in range(40)]


def test_nothing_to_do_is_done_without_a_process() -> None:
    with Pool(2) as pool:
        assert list(pool.map(abs, iter(()))) == []


@pytest.mark.parametrize(("function", "message"), [(die, "was killed"), (eat, "ran out of memory")])
def test_a_worker_that_is_killed_is_told_in_one_line(function: object, message: str) -> None:
    with pytest.raises(UserError, match=f"a worker process {message}.*--workers"), Pool(2) as pool:
        list(pool.map(function, numbers(9)))  # type: ignore[arg-type]


def test_other_errors_come_through() -> None:
    with pytest.raises(ZeroDivisionError), Pool(2) as pool:
        list(pool.map(fail, numbers(9)))


def test_idle_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text(IDLE)
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "idle.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"50\n"
    assert len(processes_of(run.pid)) > 3
    run.kill()
    run.wait()
    run.stdout.close()  # reading on would wait for the workers
    wait_for(lambda: not processes_of(run.pid), seconds=10)


def test_the_cores_of_this_process_are_counted() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0)) >= 1
