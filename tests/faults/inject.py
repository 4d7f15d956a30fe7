"""Faults that a rank of faults/ranks.py is given before it starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _each_step(act: Callable[[int], None]) -> None:
    """Call `act(steps made)` before every training step."""
    from distcnn import train

    inner: Any = train.train_step

    def step(job: Any, *rest: Any) -> Any:
        act(job.position.total)
        return inner(job, *rest)

    train.train_step = step


def slow_steps(seconds: float) -> None:
    """Steps that last long enough to be interrupted."""
    _each_step(lambda total: time.sleep(seconds))


def slow_saves(seconds: float, marker: str = "") -> None:
    """Every file of a checkpoint takes so long to reach the disk. `marker`: a file made when it begins."""
    from distcnn import checkpoint

    inner: Any = checkpoint._sync_file

    def sync(path: Path) -> None:
        if marker:
            Path(marker).touch()
        time.sleep(seconds)
        inner(path)

    checkpoint._sync_file = sync


def slow_data(seconds: float) -> None:
    """Reading takes long, each step."""
    from distcnn.data.loader import Loader

    inner: Any = Loader._finish

    def finish(self: Any, step: Any) -> Any:
        time.sleep(seconds)
        return inner(self, step)

    Loader._finish = finish  # type: ignore[method-assign]


def hang_in_data(step: int) -> None:
    """Reading never ends, from a step on."""
    from distcnn.data.loader import Loader

    inner: Any = Loader._finish

    def finish(self: Any, under_way: Any) -> Any:
        if under_way.requests[0].step >= step and self.view is not None:
            time.sleep(1000)
        return inner(self, under_way)

    Loader._finish = finish  # type: ignore[method-assign]


def signal_self(step: int, number: int, once_there_is: str = "") -> None:
    """Send itself a signal before a step (SIGSTOP: it hangs; SIGKILL: it crashes), once there is some file."""

    def act(total: int) -> None:
        if total == step:
            while once_there_is and not Path(once_there_is).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    _each_step(act)


def raise_error(step: int, user: bool) -> None:
    """Fail before a step, by an error of the user or a crash."""
    from distcnn.errors import DataError

    def act(total: int) -> None:
        if total == step:
            raise DataError("shard x.tar is gone") if user else ZeroDivisionError("a defect")

    _each_step(act)


def not_finite(steps: list[int], tile: int = 0) -> None:
    """The loss of a rank's tile is NaN at some steps, as a bit that flips in a GPU's memory makes it."""
    from distcnn import train

    at = {"total": 0, "tile": 0}
    _each_step(lambda total: at.update(total=total, tile=0))
    inner: Any = train.loss_sum

    def loss(logits_NK: torch.Tensor, *rest: Any) -> torch.Tensor:
        value: torch.Tensor = inner(logits_NK, *rest)
        at["tile"] += 1
        return value * float("nan") if at["total"] in steps and at["tile"] == tile + 1 else value

    train.loss_sum = loss


def jumping_clock() -> None:
    """The wall clock goes back an hour at every second look, as clocks do that are set by hand or by DST."""
    inner = time.time
    looks = {"number": 0}

    def now() -> float:
        looks["number"] += 1
        return inner() - 3600 * (looks["number"] % 2)

    time.time = now


def grace(seconds: float) -> None:
    """A scheduler that is less patient."""
    from distcnn import preempt

    preempt.GRACE_SECONDS = seconds


def slow_first_step(seconds: float) -> None:
    """Compilation, or a file system that wakes up."""
    _each_step(lambda total: time.sleep(seconds) if total == 0 else None)


def slow_evaluation(seconds: float) -> None:
    """A tile of the evaluation that takes long."""
    from distcnn import evaluate

    inner: Any = evaluate.rows_of

    def rows_of(*arguments: Any) -> Any:
        time.sleep(seconds)
        return inner(*arguments)

    evaluate.rows_of = rows_of


def busy(seconds: float) -> None:
    """Computing takes longer, as on a throttled device."""
    from distcnn import train

    inner: Any = train.loss_sum

    def loss(*arguments: Any) -> Any:
        time.sleep(seconds)
        return inner(*arguments)

    train.loss_sum = loss


def tiny_shared_memory() -> None:
    """A /dev/shm of one page, for this process alone."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, recursive_private = 0x20000, 0x4000 | 0x40000  # CLONE_NEWNS; MS_REC | MS_PRIVATE
    assert libc.unshare(new_mounts) == 0
    assert libc.mount(b"none", b"/", None, recursive_private, None) == 0
    assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4k") == 0
    assert os.statvfs("/dev/shm").f_blocks == 1
