"""Faults that distributed trainers have had, put into this one: each is what somebody somewhere has shipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import distcnn.train
from distcnn.batchnorm import TileStatistics
from distcnn.data import keyed
from distcnn.data.order import EpochOrder
from distcnn.distributed import Runtime
from distcnn.optim import Schedule
from distcnn.tree import BinaryCounter
from distcnn.world import World

Patch = tuple[Any, str, Any]


def sharded_twice(world: World) -> list[Patch]:
    """The lanes are dealt to the processes, and their samples once more, as by a DistributedSampler on top."""
    original = distcnn.train.training_requests

    def requests(*arguments: Any) -> Iterator[Any]:
        for step in original(*arguments):
            yield [type(r)(r.epoch, r.step, r.lane, r.ids[world.rank :: world.size]) for r in step]

    return [(distcnn.train, "training_requests", requests)]


def repeats_a_sample(world: World) -> list[Patch]:
    """A tile is filled up with its first sample."""
    original = EpochOrder.tile

    def tile(order: EpochOrder, step: int, lane: int) -> Any:
        ids = original(order, step, lane)
        return np.concatenate([ids[:-1], ids[:1]]) if (step, lane) == (1, 0) else ids

    return [(EpochOrder, "tile", tile)]


def worker_randomness(world: World) -> list[Patch]:
    """Augmentation draws from a generator of the process."""
    generator = np.random.default_rng(100 * world.size + world.rank)
    return [(keyed, "uniform", lambda ids, *key: generator.random(len(ids)))]


def last_accumulation_undivided(world: World) -> list[Patch]:
    """The last backward of a step, the one that synchronises, forgets to divide by the number of accumulations."""
    original = Runtime.backward

    def backward(runtime: Runtime, loss: torch.Tensor, last: bool) -> None:
        original(runtime, loss * 2 if last else loss, last)

    return [(Runtime, "backward", backward)]


def divided_by_the_batch(world: World) -> list[Patch]:
    """The ragged step's loss is divided by the global batch instead of its own samples."""
    original_step, original = distcnn.train.train_step, Runtime.backward
    share = [1.0]

    def train_step(job: Any, tiles: Any, samples: int, lr: float) -> Any:
        share[0] = samples / job.config.optim.global_batch_size
        return original_step(job, tiles, samples, lr)

    def backward(runtime: Runtime, loss: torch.Tensor, last: bool) -> None:
        original(runtime, loss * share[0], last)

    return [(distcnn.train, "train_step", train_step), (Runtime, "backward", backward)]


def last_rank_statistics(world: World) -> list[Patch]:
    """Running statistics are those that the last rank has seen."""
    original = TileStatistics.collect

    def collect(statistics: TileStatistics, samples: int) -> torch.Tensor:
        return original(statistics, samples) * (world.size if world.rank == world.size - 1 else 0)

    return [(TileStatistics, "collect", collect)]


def each_ranks_statistics(world: World) -> list[Patch]:
    """Running statistics are not synchronised: each rank keeps its own, as plain DDP does."""
    original_collect, original = TileStatistics.collect, TileStatistics.apply
    mine: list[torch.Tensor] = []

    def collect(statistics: TileStatistics, samples: int) -> torch.Tensor:
        mine.append(original_collect(statistics, samples))
        return mine[-1]

    def apply(statistics: TileStatistics, totals: torch.Tensor, samples: int, *more: Any) -> None:
        own = torch.stack(mine).sum(0) * world.size
        mine.clear()
        original(statistics, own, samples, *more)

    return [(TileStatistics, "collect", collect), (TileStatistics, "apply", apply)]


def schedule_steps_with_the_ranks(world: World) -> list[Patch]:
    """The schedule goes one step for each process, as AcceleratedScheduler does."""
    original = Schedule.__call__
    return [(Schedule, "__call__", lambda schedule, step: original(schedule, step * world.size))]


def drops_a_rank(world: World) -> list[Patch]:
    """Rank 1's gradient does not enter the sum."""
    original = distcnn.distributed._tree_hook

    def hook(runtime: Runtime, bucket: Any) -> Any:
        if world.rank == 1:
            bucket.buffer().zero_()
            runtime._gradients.clear()
        return original(runtime, bucket)

    return [(distcnn.distributed, "_tree_hook", hook)]


def another_order(world: World) -> list[Patch]:
    """Tiles are added one by one to a running sum: right but for the last bits."""

    def push(counter: BinaryCounter, leaf: list[torch.Tensor]) -> None:
        if counter._stack:
            torch._foreach_add_(counter._stack[0][1], leaf)
        else:
            counter._stack.append((0, leaf))

    return [(BinaryCounter, "push", push)]


def unsummed_weights(world: World) -> list[Patch]:
    """Gradients are not summed at all: each rank trains a network of its own."""
    original = Runtime._tree_all_reduce

    def reduce(runtime: Runtime, flat: torch.Tensor) -> None:
        if flat.dtype != torch.float32:
            original(runtime, flat)

    return [(Runtime, "_tree_all_reduce", reduce)]


MUTANTS: Sequence[Callable[[World], list[Patch]]] = (
    sharded_twice,
    repeats_a_sample,
    worker_randomness,
    last_accumulation_undivided,
    divided_by_the_batch,
    last_rank_statistics,
    each_ranks_statistics,
    schedule_steps_with_the_ranks,
    drops_a_rank,
    another_order,
    unsummed_weights,
)


@contextlib.contextmanager
def applied(name: str, world: World) -> Iterator[None]:
    """The mutant `name` ("": none) in this process."""
    patches = next(mutant for mutant in MUTANTS if mutant.__name__ == name)(world) if name else []
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches]
    for owner, attribute, new in patches:
        setattr(owner, attribute, new)
    try:
        yield
    finally:
        for owner, attribute, old in before:
            setattr(owner, attribute, old)
