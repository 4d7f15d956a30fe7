"""Remote shards fetched before they are needed, in the order of the epoch, which is known."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from distcnn.data.order import EpochOrder
from distcnn.data.shards import SplitReader
from distcnn.errors import UserError

THREADS = 4
LOOK_SECONDS = 0.5  # between looks at whether there is room again
_EPOCH = 1 << 40  # so that steps of all epochs are in one order


class ReadAhead:
    """Fetches what some lanes of an epoch will read, soonest first, and says what they still need.

    A shard is fetched ahead only where it fits without evicting one that is needed sooner. What cannot be fetched is
    left to the reader, which then says why.
    """

    def __init__(self, reader: SplitReader, order: EpochOrder, lanes: Iterable[int], first_step: int) -> None:
        self._reader, self._cache, self._epoch = reader, reader.cache, order.epoch
        spans: dict[int, tuple[int, int]] = {}
        for lane in lanes:
            for shard, first, last in order.lane_needs(lane):
                before = spans.get(shard, (first, last))
                spans[shard] = min(first, before[0]), max(last, before[1])
        self._spans = {shard: span for shard, span in spans.items() if span[1] >= first_step}
        self._ends = sorted((last, shard) for shard, (_, last) in self._spans.items())
        self._todo = iter(sorted(self._spans, key=lambda shard: self._spans[shard]))
        self._lock, self._moved, self._stopped = threading.Lock(), threading.Event(), False
        self._say()
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def done(self, step: int) -> None:
        """A step's samples have been read: let go of the shards that nothing after it reads."""
        finished = []
        while self._ends and self._ends[0][0] <= step:
            finished.append(self._ends.pop(0)[1])
        if finished:
            for shard in finished:
                del self._spans[shard]
            self._reader.release(finished)
            self._say()
            self._moved.set()

    def stop(self) -> None:
        """Fetch no more; a download under way is not waited for."""
        self._stopped = True
        self._moved.set()

    def _say(self) -> None:
        shards = self._reader.split.shards
        base = self._epoch * _EPOCH
        self._cache.need({shards[shard]: base + first for shard, (first, _) in self._spans.items()})

    def _work(self) -> None:
        while not self._stopped:
            with self._lock:
                shard = next(self._todo, None)
            if shard is None:
                return
            entry = self._reader.split.shards[shard]
            try:
                while not self._stopped and shard in self._spans and not self._cache.fetch_ahead(entry):
                    self._moved.wait(LOOK_SECONDS)
                    self._moved.clear()
            except UserError:  # the reader will meet it too, and say so
                continue
