"""The plan of an epoch at the size of ImageNet and of a billion samples: time, memory, shards a rank opens."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from distcnn.data.loader import training_requests
from distcnn.data.order import EpochOrder, Geometry


def shard_sizes(samples: int, shards: int) -> np.ndarray:
    sizes = np.full(shards, samples // shards)
    sizes[: samples % shards] += 1
    return sizes


SETS = {"imagenet": (1_281_167, 1_168), "billion": (1_000_000_000, 100_000)}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("ranks", "lanes"), [(8, 8), (8, 64), (1024, 1024)])
def test_a_rank_plans_in_seconds_and_little_memory(name: str, ranks: int, lanes: int) -> None:
    samples, shards = SETS[name]
    sizes = shard_sizes(samples, shards)
    geometry = Geometry(lanes * 32, 32)
    for rank in {0, ranks // 2, ranks - 1}:
        tracemalloc.start()
        started = time.process_time()
        order = EpochOrder(sizes, geometry, 0, 0)
        mine = geometry.lanes_of(rank, ranks)
        for first in (0, order.steps // 2, order.steps - 1):
            step = next(training_requests(order, mine, first))
            assert sum(len(request.ids) for request in step) <= len(mine) * 32
        seconds = time.process_time() - started
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < 2
        assert peak_bytes < 256 << 20


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("ranks", "limit"), [(8, 1.05), (1024, 2.0)])
def test_a_rank_opens_its_share_of_the_shards(name: str, ranks: int, limit: float) -> None:
    """Also in bytes: whole shards that a rank opens, over what it needs of them."""
    samples, shards = SETS[name]
    sizes = shard_sizes(samples, shards)
    geometry = Geometry(1024 * 4, 4)
    order = EpochOrder(sizes, geometry, 3, 1)
    opened_samples = 0
    for rank in range(ranks):
        lanes = geometry.lanes_of(rank, ranks)
        opened = np.unique(np.concatenate([order.lane_shards(lane) for lane in lanes]))
        opened_samples += int(sizes[opened].sum())
        assert len(opened) <= shards // ranks + 3
    assert opened_samples / samples <= limit


def test_cost_of_a_step_does_not_grow_with_the_epoch() -> None:
    order = EpochOrder(shard_sizes(*SETS["billion"]), Geometry(1024 * 32, 32), 0, 0)
    started = time.process_time()
    for step in range(0, order.steps, order.steps // 1000):
        assert order.tile_sizes(step)[0] > 0
        assert order.consumed(step) == step * 1024 * 32
    assert time.process_time() - started < 1
