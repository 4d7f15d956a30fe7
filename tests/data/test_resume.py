"""Opening deep in an epoch costs no replay."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np

from distcnn.data.loader import training_requests
from distcnn.data.order import EpochOrder, Geometry


def test_opening_at_99_percent_of_ten_million_samples_takes_no_time() -> None:
    counts = np.full(10_000, 1_000)
    geometry = Geometry(256, 32)
    whole = EpochOrder(counts, geometry, 0, 0)
    at = whole.steps * 99 // 100
    tracemalloc.start()
    started = time.perf_counter()
    order = EpochOrder(counts, geometry, 0, 0)
    step = next(training_requests(order, range(8), at))
    seconds = time.perf_counter() - started
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak_bytes < 64 << 20
    assert sum(len(request.ids) for request in step) == 256
    assert order.consumed(at) == at * 256


def test_the_tail_is_the_same_whether_one_came_from_the_start_or_not() -> None:
    counts = np.array([700, 0, 1, 350, 999, 12] * 5)
    geometry = Geometry(64, 8)
    steps = list(training_requests(EpochOrder(counts, geometry, 9, 4, 3), range(8)))
    for first in range(0, len(steps) + 1, 7):
        rest = list(training_requests(EpochOrder(counts, geometry, 9, 4, 3), range(8), first))
        assert len(rest) == len(steps) - first
        for a, b in zip(rest, steps[first:], strict=True):
            assert all(np.array_equal(x.ids, y.ids) and x.step == y.step for x, y in zip(a, b, strict=True))
