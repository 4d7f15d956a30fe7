"""Which sample comes when: a pure function of (seed, epoch, step, lane) and the shard sizes. numpy only.

Three words are invented here and used everywhere:

* **tile**: the m samples that one forward pass sees;
* **lane**: one of C = B / m parallel streams; step k of a global batch B is tile k of every lane, in lane order;
* **window**: some neighbouring shards of a lane whose samples are shuffled together.

Per epoch the shards are permuted, laid end to end and cut at N*c // C into C lanes of equal length (to one sample);
inside a lane, samples are shuffled within windows. No rank, no worker and no history enters, so the global order is
the same for any number of processes, and any position is reached without replay.

Random bits are raw Philox4x64-10 words (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
numpy promises that a bit generator's raw stream never changes, which it does not promise of `permutation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
DEFAULT_WINDOW_SHARDS = 16

Ids = NDArray[np.int64]

_SHARDS, _WINDOW = 1, 2  # what a stream of random words is for: the last word of the counter


def random_words(n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0) -> NDArray[np.uint64]:
    """n uint64 of a Philox stream of their own: streams of different arguments never meet."""
    counter = np.array([0, window, lane, epoch], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(n)


def permutation(n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0) -> Ids:
    """(n,) int64: a uniform permutation, by sorting random words (stable, so ties too are defined)."""
    return np.argsort(random_words(n, seed, purpose, epoch, lane, window), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Geometry:
    """How a step is cut: B samples in C = B / m tiles of m. It comes from the config, never from the world size."""

    global_batch: int
    tile: int

    def __post_init__(self) -> None:
        if self.tile < 1 or self.global_batch < 1 or self.global_batch % self.tile:
            raise ValueError(f"global batch {self.global_batch} is not a multiple of the tile size {self.tile}")

    @property
    def lanes(self) -> int:
        return self.global_batch // self.tile

    def lanes_of(self, rank: int, size: int) -> range:
        """The lanes of rank r of R: C*r/R .. C*(r+1)/R. Raises ValueError if there are more ranks than lanes."""
        if size > self.lanes:
            raise ValueError(
                f"{size} processes, but only {self.lanes} lanes (global batch {self.global_batch} / tile {self.tile}):"
                f" use at most {self.lanes} processes, a larger global batch or a smaller tile"
            )
        return range(self.lanes * rank // size, self.lanes * (rank + 1) // size)


class EpochOrder:
    """The order of one epoch over shards of `counts` samples. Ids are 0..N-1 in the order of the manifest."""

    def __init__(
        self,
        counts: Ids,
        geometry: Geometry,
        seed: int,
        epoch: int,
        window_shards: int = DEFAULT_WINDOW_SHARDS,
    ) -> None:
        if window_shards < 1:
            raise ValueError(f"a window of {window_shards} shards: at least 1")
        self.counts = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or (self.counts < 0).any():
            raise ValueError("shard sizes must be a list of numbers >= 0")
        self.geometry, self.seed, self.epoch, self.window_shards = geometry, seed, epoch, window_shards
        self.samples = int(self.counts.sum())
        self._first_id = np.concatenate([[0], np.cumsum(self.counts)])  # (S + 1,) id of each shard's first sample
        self._shards = permutation(len(self.counts), seed, _SHARDS, epoch)  # (S,) shards in this epoch's order
        self._ends = np.cumsum(self.counts[self._shards])  # (S,) where each ends when laid end to end
        lanes = geometry.lanes
        self._cuts = [self.samples * c // lanes for c in range(lanes + 1)]
        self._window = lru_cache(maxsize=2 * lanes)(self._make_window)
        self._windows = lru_cache(maxsize=lanes)(self._make_window_cuts)

    @property
    def steps(self) -> int:
        """Steps in the epoch; the last may be ragged. 0 for an empty split."""
        longest = -(-self.samples // self.geometry.lanes)
        return -(-longest // self.geometry.tile)

    def lane_length(self, lane: int) -> int:
        return self._cuts[lane + 1] - self._cuts[lane]

    def tile_sizes(self, step: int) -> list[int]:
        """The sizes of the C tiles of a step: m each but in the last step, and known to every rank without talking."""
        m = self.geometry.tile
        return [min(max(self.lane_length(c) - step * m, 0), m) for c in range(self.geometry.lanes)]

    def consumed(self, step: int) -> int:
        """Samples of this epoch used up before `step`."""
        m = self.geometry.tile
        return sum(min(self.lane_length(c), step * m) for c in range(self.geometry.lanes))

    def tile(self, step: int, lane: int) -> Ids:
        """(n,) int64 ids of a lane's tile at a step, n <= m. O(window), whatever the step: no replay."""
        m = self.geometry.tile
        return self.lane_slice(lane, step * m, (step + 1) * m)

    def lane_slice(self, lane: int, start: int, stop: int) -> Ids:
        """(stop - start,) ids at positions start..stop of a lane, cut at the lane's end."""
        stop = min(stop, self.lane_length(lane))
        pieces: list[Ids] = []
        cuts = self._windows(lane)
        window = int(np.searchsorted(cuts, start, side="right")) - 1
        while start < stop:
            begin, end = int(cuts[window]), int(cuts[window + 1])
            take = min(stop, end)
            if take > start:
                pieces.append(self._window(lane, window)[start - begin : take - begin])
            start, window = max(start, take), window + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def lane_shards(self, lane: int) -> Ids:
        """The shards a lane reads, in the order in which their windows come. Empty shards are left out."""
        first, last = self._shard_range(lane)
        shards = self._shards[first:last]
        return shards[self.counts[shards] > 0]

    def _shard_range(self, lane: int) -> tuple[int, int]:
        """The places first..last in the permuted list of the shards that overlap the lane."""
        low, high = self._cuts[lane], self._cuts[lane + 1]
        if low == high:
            return 0, 0
        first = int(np.searchsorted(self._ends, low, side="right"))
        return first, int(np.searchsorted(self._ends, high, side="left")) + 1

    def _make_window_cuts(self, lane: int) -> Ids:
        """(W + 1,) positions in the lane at which its windows begin and end."""
        first, last = self._shard_range(lane)
        low, high = self._cuts[lane], self._cuts[lane + 1]
        ends = self._ends[first + self.window_shards - 1 : last : self.window_shards]
        inside = ends[ends < high] - low
        return np.concatenate([[0], inside, [high - low]]).astype(np.int64)

    def _make_window(self, lane: int, window: int) -> Ids:
        """The shuffled ids of one window of a lane."""
        first, last = self._shard_range(lane)
        low, high = self._cuts[lane], self._cuts[lane + 1]
        begin = first + window * self.window_shards
        parts = []
        for place in range(begin, min(begin + self.window_shards, last)):
            shard = self._shards[place]
            end = int(self._ends[place])
            start = end - int(self.counts[shard])
            first_id = int(self._first_id[shard])
            parts.append(np.arange(max(low, start) - start, min(high, end) - start, dtype=np.int64) + first_id)
        ids = np.concatenate(parts)
        return ids[permutation(len(ids), self.seed, _WINDOW, self.epoch, lane, window)]


def evaluation_tiles(samples: int, tile: int) -> list[tuple[int, int]]:
    """(start, stop) of the fixed tiles of an evaluation, in id order; tile t belongs to rank t mod R."""
    return [(start, min(start + tile, samples)) for start in range(0, samples, tile)]
