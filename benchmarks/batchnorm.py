"""What batch norm by tile costs: a training step with it beside one with torch's own batch norm.

    python benchmarks/batchnorm.py [--model resnet18] [--side 32] [--tile 32] [--pairs 40] [--threads 1]

Two jobs with the same config live in one process, of one tile a step. In the second the network's batch norms are
torch.nn.BatchNorm2d again, which move their running statistics themselves. Each pair is a step of both, one after the
other, in changing order. CPU time is the process's own, so that other programs disturb it less than wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distcnn.batchnorm import TileBatchNorm2d, TileStatistics
from distcnn.build import open_dataset
from distcnn.config import TrainConfig, from_flat
from distcnn.console import Console
from distcnn.data.loader import Tile, TileRequest
from distcnn.data.prepare import prepare_digits
from distcnn.distributed import Runtime
from distcnn.job import Job, build_job
from distcnn.preempt import StopRequest
from distcnn.train import train_step
from distcnn.world import World


def make_jobs(config: TrainConfig) -> tuple[Job, Job]:
    """(with batch norm by tile, with torch's own)."""
    dataset = open_dataset(config, World())
    runtime = Runtime(config.run, World(), config.run.threads)
    with StopRequest(config.output, False) as stop:
        tiled, plain = (build_job(config, dataset, runtime, Console(False), stop) for _ in range(2))
    for module in plain.model.modules():
        if isinstance(module, TileBatchNorm2d):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    plain.statistics = TileStatistics(plain.model)
    assert tiled.statistics.size and not plain.statistics.size
    return tiled, plain


def step(job: Job, tile: Tile) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a training step."""
    job.runtime._parameters = [p for p in job.model.parameters() if p.requires_grad]  # the two share a Runtime
    cpu, wall = time.process_time(), time.perf_counter()
    train_step(job, [tile], len(tile.labels), 1e-3)
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--tile", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        prepare_digits(data)
        measure(asked, data)


def measure(asked: argparse.Namespace, data: Path) -> None:
    size = {"image_size": asked.side, "global_batch_size": asked.tile, "tile_size": asked.tile, "data": str(data)}
    quiet = {"device": "cpu", "threads": asked.threads, "wandb_mode": "disabled", "output": str(data / "run")}
    jobs = make_jobs(from_flat({"model": asked.model, **size, **quiet}))
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (asked.tile, asked.side, asked.side, 3), dtype=torch.uint8, generator=noise)
    labels = torch.arange(asked.tile) % 10
    tile = Tile(TileRequest(0, 0, 0, np.arange(asked.tile)), images, labels, torch.ones(asked.tile))
    for job in jobs * 3:
        step(job, tile)
    times: list[tuple[list[tuple[float, float]], ...]] = []
    for number in range(asked.pairs):
        order = (0, 1) if number % 2 else (1, 0)
        found = {which: step(jobs[which], tile) for which in order}
        times.append(([found[0]], [found[1]]))
    for what, column in (("CPU", 0), ("wall", 1)):
        pairs = [(tiled[0][column], plain[0][column]) for tiled, plain in times]
        ratios = sorted(tiled / plain - 1 for tiled, plain in pairs)
        low, middle, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.5, 0.75))
        own = [1000 * statistics.median(pair[i] for pair in pairs) for i in (0, 1)]
        print(
            f"{asked.model} {asked.side} px, tile {asked.tile}, {asked.threads} threads, {what}: tile {own[0]:.1f} ms,"
            f" torch's {own[1]:.1f} ms; of {len(ratios)} pairs {middle:+.1%} (quartiles {low:+.1%} to {high:+.1%})"
        )


if __name__ == "__main__":
    main()
