"""What a tile size costs: real training steps of one process, timed, with the memory that they take."""

from __future__ import annotations

import dataclasses
import gc
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distcnn.build import Dataset
from distcnn.config import TrainConfig
from distcnn.data.loader import Tile, training_requests
from distcnn.job import Job
from distcnn.plotting import Style, picture
from distcnn.train import epoch_order, train_step
from distcnn.tune.trial import trial_job
from distcnn.world import World

ENOUGH = 0.9  # of the best speed
RULE = f"the smallest tile with {ENOUGH:.0%} of the best speed: smaller ones leave more lanes, that is processes"
MIN_ROUNDS = 3
NOISY = 0.5  # a spread above which something else must be using the machine


@dataclass(frozen=True)
class Measured:
    """What steps of tiles of `tile` images made: images a second (0: out of memory), and the peak of memory in bytes.

    Memory is the GPU's that tensors took, or on the CPU all that the process has had so far: measure small tiles first.
    """

    tile: int
    lanes: int
    images_per_second: float
    memory_bytes: int
    spread: float = 0.0  # by how much of it the median round took longer than the fastest


def tile_sizes(batch: int) -> list[int]:
    """The powers of two that divide the global batch."""
    return [size for size in (1 << power for power in range(batch.bit_length())) if batch % size == 0]


def measure(config: TrainConfig, dataset: Dataset, world: World, tile: int, seconds: float) -> Measured:
    """Make training steps with tiles of `tile` images for about so many seconds, the loading left out.

    Where a whole step would take longer, it is made of fewer tiles: the optimizer then counts for more than it does.
    """
    optim = dataclasses.replace(config.optim, tile_size=tile)
    config = dataclasses.replace(config, optim=optim)
    try:
        with trial_job(config, dataset, world) as job:
            return Measured(tile, config.geometry.lanes, *_measure(job, seconds))
    except torch.cuda.OutOfMemoryError:
        return Measured(tile, config.geometry.lanes, 0.0, 0)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def suggest(rows: Sequence[Measured]) -> Measured | None:
    """By RULE; None where nothing fits into memory."""
    best = max((row.images_per_second for row in rows), default=0.0)
    return next((row for row in rows if row.images_per_second >= ENOUGH * best > 0), None)


def _measure(job: Job, seconds: float) -> tuple[float, int, float]:
    """(images a second in the fastest round, so that what else the machine does counts little; peak bytes; spread)."""
    tiles = _first_tiles(job)
    if job.runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warm = _seconds(job, tiles[:1])  # allocations, and the choice of kernels
    warm = min(warm, _seconds(job, tiles[:1]))
    part = tiles[: max(1, min(len(tiles), int(seconds / MIN_ROUNDS / max(warm, 1e-9))))]
    images = sum(len(tile.labels) for tile in part)
    begun = time.perf_counter()
    rounds: list[float] = []
    while len(rounds) < MIN_ROUNDS or time.perf_counter() - begun < seconds:
        rounds.append(_seconds(job, part))
        if time.perf_counter() - begun > 3 * seconds:
            break
    fastest = min(rounds)
    return images / fastest, _peak_bytes(job), sorted(rounds)[len(rounds) // 2] / fastest - 1


def _seconds(job: Job, tiles: list[Tile]) -> float:
    """Of one step of these tiles. The rate is 0: weights stay as they are, whatever the tile size."""
    begun = _now(job)
    train_step(job, tiles, sum(len(tile.labels) for tile in tiles), 0.0)
    return _now(job) - begun


def _first_tiles(job: Job) -> list[Tile]:
    """The tiles of the run's first step, copied: the loader uses its buffers again."""
    order = epoch_order(job, 0)
    requests = training_requests(order, range(job.config.geometry.lanes))
    tiles = next(iter(job.loader.steps(requests)))
    return [dataclasses.replace(tile, images=tile.images.clone()) for tile in tiles if len(tile.labels)]


def _now(job: Job) -> float:
    if job.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes(job: Job) -> int:
    if job.runtime.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw(rows: Sequence[Measured], chosen: Measured | None, own: int) -> bytes:
    """PNG bytes: speed by tile size, what is suggested and the config's own marked."""
    known = [row for row in rows if row.images_per_second]

    def bars(axes: Any, style: Style) -> None:
        for place, row in enumerate(known):
            color = style.color(2 if row is chosen else 4 if row.tile == own else 0)
            axes.bar(place, row.images_per_second, 0.7, color=color)
        axes.set_xticks(range(len(known)), list(_labels(known, chosen, own)))
        axes.set_xlabel("tile size")
        axes.set_ylabel("images/s of one process")

    return picture(bars, 3.0, transparent=False)


def _labels(rows: Sequence[Measured], chosen: Measured | None, own: int) -> Iterator[str]:
    for row in rows:
        words = [str(row.tile)] + ["now"] * (row.tile == own) + ["suggested"] * (row is chosen)
        yield "\n".join(words)
