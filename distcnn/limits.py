"""When a run gives up: too much that cannot be read, too many steps that are not finite, weights that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distcnn.errors import DataError, UserError
from distcnn.runfolder import QUARANTINE

if TYPE_CHECKING:
    from distcnn.job import Job

MAX_BAD_SHARE = 0.01  # of the samples seen by a rank; beyond it the run stops
MAX_BAD_STEPS = 10  # in a row that are not finite; then the run stops


class NotFinite(UserError):
    """Training has diverged."""


def check_finite(job: Job, left_out: bool) -> None:
    """Keep a record of a step that was not finite, and give up after too many in a row. All ranks do so together."""
    job.bad_steps = job.bad_steps + 1 if left_out else 0
    if left_out:
        job.left_out += 1
        job.blackbox.write(job)
    if job.bad_steps >= MAX_BAD_STEPS:
        raise NotFinite(
            f"loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step {job.position.total} of"
            f" epoch {job.position.epoch + 1}: lower --lr, set --clip-grad-norm, or check the data; the weights of"
            " the last checkpoint are good"
        )


def refuse_what_is_not_finite(job: Job) -> None:
    """Raises NotFinite before weights are saved that are. They are the same on all ranks, so all do so together."""
    modules = [job.model, *([job.ema.model] if job.ema else [])]
    tensors = [t for module in modules for t in module.state_dict().values() if t.is_floating_point()]
    bad = torch.stack([~torch.isfinite(tensor).all() for tensor in tensors]).any()
    if bad:
        raise NotFinite(
            f"weights are not finite after step {job.position.total}, and so are not saved: lower --lr; the last"
            " checkpoint is good"
        )


def check_bad_share(job: Job) -> None:
    """Stop, naming shard and key, when too much of the data turns out to be unreadable."""
    stats = job.loader.stats
    if stats.bad and len(stats.bad) > max(MAX_BAD_SHARE * stats.samples, 10):
        last = stats.bad[-1]
        raise DataError(
            f"{len(stats.bad)} of {stats.samples} samples cannot be read, the last one {last.key!r} of {last.shard}"
            f" ({last.reason}); all are in {job.run / QUARANTINE}"
        )
