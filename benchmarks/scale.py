"""What an epoch's plan costs a rank at the size of ImageNet and of a billion samples, and what it reads.

    python benchmarks/scale.py

No images: only the sizes of the shards. Times are processor seconds of one rank, memory what Python and NumPy hold at
the peak. Bytes are counted in samples: shards fetched whole, over the samples needed; local shards are read exactly.
"""

from __future__ import annotations

import sys
import time
import tracemalloc

import numpy as np

from distcnn.data.loader import training_requests
from distcnn.data.order import EpochOrder, Geometry

SETS = {"ImageNet": (1_281_167, 1_168), "a billion": (1_000_000_000, 100_000)}
SHAPES = ((8, 8), (8, 64), (1024, 1024))  # ranks, lanes
TILE = 32
NODE = 8  # ranks that share a cache


def sizes(samples: int, shards: int) -> np.ndarray:
    counts = np.full(shards, samples // shards)
    counts[: samples % shards] += 1
    return counts


def plan_one_rank(counts: np.ndarray, geometry: Geometry, ranks: int) -> tuple[float, float, float]:
    """(seconds to the first step, seconds to open at 99 % of the epoch, MiB)."""
    lanes = geometry.lanes_of(ranks // 2, ranks)
    tracemalloc.start()
    begun = time.process_time()
    order = EpochOrder(counts, geometry, 0, 0)
    next(training_requests(order, lanes))
    first = time.process_time() - begun
    begun = time.process_time()
    order = EpochOrder(counts, geometry, 0, 0)
    next(training_requests(order, lanes, order.steps * 99 // 100))
    late = time.process_time() - begun
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return first, late, peak


def shards_read(counts: np.ndarray, geometry: Geometry, ranks: int) -> tuple[int, float, float]:
    """(most shards a rank opens, samples of shards fetched / needed, by rank and by node)."""
    order = EpochOrder(counts, geometry, 0, 0)
    by_rank = [
        np.unique(np.concatenate([order.lane_shards(lane) for lane in geometry.lanes_of(rank, ranks)]))
        for rank in range(ranks)
    ]
    by_node = [np.unique(np.concatenate(by_rank[i : i + NODE])) for i in range(0, ranks, NODE)]
    total = counts.sum()
    return (
        max(map(len, by_rank)),
        sum(int(counts[shards].sum()) for shards in by_rank) / total,
        sum(int(counts[shards].sum()) for shards in by_node) / total,
    )


def main() -> int:
    print(
        f"{'set':<12}{'ranks':>6}{'lanes':>6}{'first s':>9}{'99 % s':>8}{'MiB':>6}{'shards':>8}{'rank':>7}{'node':>7}"
    )
    for name, (samples, shards) in SETS.items():
        counts = sizes(samples, shards)
        for ranks, lanes in SHAPES:
            geometry = Geometry(lanes * TILE, TILE)
            first, late, peak = plan_one_rank(counts, geometry, ranks)
            opened, rank, node = shards_read(counts, geometry, ranks)
            print(
                f"{name:<12}{ranks:>6}{lanes:>6}{first:>9.2f}{late:>8.2f}{peak:>6.0f}{opened:>8}{rank:>7.3f}{node:>7.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
