"""Counts starts that come to nothing, so that a run that crashes at the same place again and again does not go on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from distcnn.errors import LostRank, UserError
from distcnn.files import write_atomically
from distcnn.heartbeat import read_all
from distcnn.preempt import Preempted

STARTS = "starts.json"
MAX_STARTS = 5  # without a new checkpoint


def count_start(run: Path, step: int) -> None:
    """Note that the run starts at the checkpoint of `step` (0: none yet); rank 0 does so.

    Raises UserError, whose exit code no launch script retries, after MAX_STARTS without a new checkpoint.
    """
    file = run / STARTS
    starts = _starts_from(file, step)
    if starts >= MAX_STARTS:
        beats = read_all(run)
        last = min(beats, key=lambda beat: (beat.total, beat.rank)) if beats else None
        where = f", the last time in {last.place()} ({last.who()})" if last else ""
        raise UserError(
            f"{run} has been started {starts} times from step {step} and has ended each time before a new checkpoint"
            f"{where}: mend the cause (see {run / 'logs'}), then delete {file}"
        )
    write_atomically(file, json.dumps({"step": step, "starts": starts + 1}).encode())


@contextlib.contextmanager
def counted(run: Path, counts: bool) -> Iterator[None]:
    """Around a run whose start was counted. One that ends in order, or by what the user can mend, is forgiven.

    counts: whether this is rank 0. A stop without a checkpoint is not forgiven: so it would go on for ever.
    """
    try:
        yield
    except LostRank:
        raise
    except Preempted as request:
        if request.saved and counts:
            _forgive(run)
        raise
    except UserError:
        if counts:
            _forgive(run)
        raise
    if counts:
        _forgive(run)


def _forgive(run: Path) -> None:
    with contextlib.suppress(OSError):
        (run / STARTS).unlink(missing_ok=True)


def _starts_from(file: Path, step: int) -> int:
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        return int(row["starts"]) if row["step"] == step else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
