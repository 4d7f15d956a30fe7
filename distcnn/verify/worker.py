"""A process of a run that `distcnn verify` looks on at: `torchrun ... -m distcnn.verify.worker RUN.json`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

from distcnn.augment import Augment, Targets
from distcnn.build import open_dataset
from distcnn.config import TrainConfig, load_toml
from distcnn.console import Console
from distcnn.data.loader import Tile, training_requests
from distcnn.distributed import Runtime
from distcnn.errors import EXIT_FAILED, UserError
from distcnn.job import Job, build_job
from distcnn.preempt import StopRequest
from distcnn.train import epoch_order, train, train_step
from distcnn.verify.record import Recorder
from distcnn.world import World, read_world

OVERFIT_SAMPLES = 32
OVERFIT_STEPS = 150
OVERFIT_SECONDS = 60.0
OVERFIT_LOSS = 0.05  # exp(-0.05): the right class has 95 % on the average
RATES = (1.0, 0.1, 0.01)  # of --lr: what suits a large batch may be too much for a small one


def main(path: Path) -> int:
    """Run what the file says and record it; what goes wrong is recorded, too."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    world = World() if spec["processes"] == 1 else read_world()
    recorder = Recorder(Path(spec["trace"]), world.rank, spec["keep"], spec["kill_at"])
    try:
        config = load_toml(Path(spec["config"]))
        if spec["task"] == "overfit":
            recorder.row("overfit", **overfit(config, world))
            recorder.row("end")
        else:
            train(config, world, recorder)
            recorder.end()
    except UserError as error:
        recorder.row("error", text=str(error), user=True)
        return EXIT_FAILED
    except Exception as error:
        recorder.row("error", text=f"{type(error).__name__}: {error}", user=False)
        raise
    finally:
        recorder.close()
    return 0


def overfit(config: TrainConfig, world: World) -> dict[str, Any]:
    """Train on one small batch, without augmentation, until it is known by heart; returns how the loss went."""
    dataset = open_dataset(config, world)
    runtime = Runtime(config.run, world, config.run.threads)
    tries: dict[str, list[float]] = {}
    started = time.monotonic()
    try:
        for rate in RATES:
            with StopRequest(config.output, False) as stop:
                job = build_job(config, dataset, runtime, Console(False), stop)
                lr = config.optim.lr * rate
                losses = tries[f"{lr:.3g}"] = _repeat(job, lr, started + OVERFIT_SECONDS)
                job.loader.close()
                job.val_loader.close()
            if losses[-1] <= OVERFIT_LOSS or time.monotonic() > started + OVERFIT_SECONDS:
                break
    finally:
        runtime.close()
    return {"tries": tries, "target": OVERFIT_LOSS, "in_time": time.monotonic() <= started + OVERFIT_SECONDS}


def _repeat(job: Job, lr: float, deadline: float) -> list[float]:
    """The losses of real training steps on the same tiles."""
    augment = job.augment

    def plain(tile: Tile, device: torch.device, train: bool) -> tuple[torch.Tensor, Targets]:
        return augment(tile, device, train=False)

    job.augment = cast(Augment, plain)
    tiles = _first_tiles(job)
    samples = sum(len(tile.labels) for tile in tiles)
    losses: list[float] = []
    while len(losses) < OVERFIT_STEPS and time.monotonic() < deadline:
        losses.append(float(train_step(job, tiles, samples, lr)[0]))
        if losses[-1] <= OVERFIT_LOSS:
            break
    return losses


def _first_tiles(job: Job) -> list[Tile]:
    """At most OVERFIT_SAMPLES samples of the first step, in tiles of the usual size."""
    requests = training_requests(epoch_order(job, 0), range(job.config.geometry.lanes))
    tiles: list[Tile] = []
    for tile in next(iter(job.loader.steps(requests))):
        room = OVERFIT_SAMPLES - sum(len(before.labels) for before in tiles)
        if room > 0 and len(tile.labels):
            request = dataclasses.replace(tile.request, ids=tile.request.ids[:room])
            tiles.append(Tile(request, tile.images[:room].clone(), tile.labels[:room], tile.weights[:room]))
    return tiles


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
