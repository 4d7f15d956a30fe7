"""A job that is thrown away: the trainer's own model, optimizer, loaders and steps, in a temporary run folder."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distcnn.build import Dataset, compute_threads
from distcnn.config import TrainConfig
from distcnn.console import Console
from distcnn.distributed import Runtime, process_cores
from distcnn.errors import UserError
from distcnn.job import Job, build_job
from distcnn.memory import keep_freed_memory
from distcnn.preempt import StopRequest
from distcnn.world import World, read_world


def one_process() -> World:
    """This process, alone. Raises UserError where there are others."""
    world = read_world()
    if world.size > 1:
        raise UserError(f"start it as one process, without a launcher: {world.size} would only do the same work again")
    return world


@contextmanager
def trial_job(config: TrainConfig, dataset: Dataset, world: World) -> Iterator[Job]:
    """The job of a config as `train` builds it, without averages of weights, tracking or a run folder that stays."""
    with tempfile.TemporaryDirectory(prefix="distcnn-tune-", ignore_cleanup_errors=True) as folder:
        run = dataclasses.replace(config.run, output=folder, quiet=True, stall_timeout=0.0)
        optim = dataclasses.replace(config.optim, ema_decay=0.0, lookahead=0)
        config = dataclasses.replace(config, run=run, optim=optim)
        runtime = Runtime(config.run, world, compute_threads(config, dataset, world, process_cores()))
        if runtime.device.type == "cpu":
            keep_freed_memory()
        try:
            job = build_job(config, dataset, runtime, Console(True, quiet=True), StopRequest(Path(folder), False))
            try:
                yield job
            finally:
                job.loader.close()
                job.val_loader.close()
        finally:
            runtime.close()
