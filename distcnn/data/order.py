"""Which sample comes when: a pure function of (seed, epoch, step, lane) and the shard sizes. numpy only.

Three words are invented here and used everywhere:

* **tile**: the m samples that one forward pass sees;
* **lane**: one of C = B / m parallel streams; step k of a global batch B is tile k of every lane, in lane order;
* **window**: some neighbouring shards of a lane whose samples are shuffled together.

Per epoch the shards are permuted, laid end to end and cut at N*c // C into C lanes of equal length (to one sample);
inside a lane, samples are shuffled within windows. No rank, no worker and no history enters, so the global order is
the same for any number of processes, and any position is reached without replay.

An id is the number of a sample, 0 .. N - 1. Where samples come several times an epoch (balance.py), the bits above say
how often one has come before: 0 at first, so that its draws are those of an epoch in which it comes once.

Random bits are raw Philox4x64-10 words (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
numpy promises that a bit generator's raw stream never changes, which it does not promise of `permutation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 2
WINDOW_SHARDS, WINDOW_SAMPLES = 16, 65_536  # an automatic window has at least so many of both

Ids = NDArray[np.int64]

_NUMBER_BITS = 36
SAMPLES, OCCURRENCES = 1 << _NUMBER_BITS, 1 << 23  # at most; ten times an id is still an int64 (see views.py)

_SHARDS, _WINDOW = 1, 2  # what a stream of random words is for: the last word of the counter


def random_words(n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0) -> NDArray[np.uint64]:
    """n uint64 of a Philox stream of their own: streams of different arguments never meet."""
    counter = np.array([0, window, lane, epoch], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(n)


def permutation(n: int, seed: int, purpose: int, epoch: int, lane: int = 0, window: int = 0) -> Ids:
    """(n,) int64: a uniform permutation, by sorting random words; equal words keep their order."""
    words = random_words(n, seed, purpose, epoch, lane, window)
    order = np.argsort(words)  # six times faster than a stable sort, and the same unless two words are equal
    ordered = words[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(words, kind="stable")
    return order.astype(np.int64)


def sample_of(ids: Ids) -> Ids:
    """(n,) the numbers of the samples, however often they have come before."""
    return ids & (SAMPLES - 1)


def nth_time(samples: Ids, before: Ids) -> Ids:
    """(n,) the ids of samples that have come `before` (n,) times in the epoch."""
    return samples | before << _NUMBER_BITS


def every_time(times: Ids, first: int = 0) -> Ids:
    """(sum of times,) the ids of all that comes if sample `first` + i comes times[i] times, in order."""
    samples = np.repeat(np.arange(first, first + len(times)), times)
    return nth_time(samples, np.arange(len(samples)) - np.repeat(np.cumsum(times) - times, times))


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


def automatic_window(counts: Ids) -> int:
    """Shards in a window where nobody says how many, from the shards' sizes alone: at least 16, and 65,536 samples.

    Shuffled shards mix as well as a full shuffle with any window. Of ImageNet sorted by class, the counts of classes
    in a batch of 256 (8 lanes) vary 2.2 times as much as by chance with 16 shards, 1.14 times with 65,536 samples (60
    shards), 0.99 times with whole lanes; a window's shards are what a node keeps at hand of a remote set.
    """
    samples = int(counts.sum())
    return max(WINDOW_SHARDS, -(-WINDOW_SAMPLES * len(counts) // samples)) if samples else WINDOW_SHARDS


class EpochOrder:
    """The order of one epoch over shards of `counts` samples. Ids are 0..N-1 in the order of the manifest.

    window_shards: about how many shards of a lane are shuffled together; 0 = `automatic_window`.
    """

    def __init__(
        self,
        counts: Ids,
        geometry: Geometry,
        seed: int,
        epoch: int,
        window_shards: int = 0,
    ) -> None:
        if window_shards < 0:
            raise ValueError(f"a window of {window_shards} shards: at least 1, or 0 for automatic")
        self.counts = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or (self.counts < 0).any():
            raise ValueError("shard sizes must be a list of numbers >= 0")
        self.geometry, self.seed, self.epoch = geometry, seed, epoch
        self.window_shards = window_shards or automatic_window(self.counts)
        self.samples = int(self.counts.sum())
        self._first_id = np.concatenate([[0], np.cumsum(self.counts)])  # (S + 1,) id of each shard's first sample
        self._shards = permutation(len(self.counts), seed, _SHARDS, epoch)  # (S,) shards in this epoch's order
        self._ends = np.cumsum(self.counts[self._shards])  # (S,) where each ends when laid end to end
        lanes = geometry.lanes
        self._cuts = [self.samples * c // lanes for c in range(lanes + 1)]
        self._window_cuts: dict[int, Ids] = {}  # by lane
        self._kept: dict[int, tuple[int, _Window]] = {}  # by lane: its window in use, and that window's number

    @property
    def steps(self) -> int:
        """Steps in the epoch; the last may be ragged. 0 for an empty split."""
        longest = -(-self.samples // self.geometry.lanes)
        return -(-longest // self.geometry.tile)

    def lane_length(self, lane: int) -> int:
        return self._cuts[lane + 1] - self._cuts[lane]

    def tile_sizes(self, step: int) -> list[int]:
        """The sizes of the C tiles of a step: m each but in the last step, and known to every rank without talking."""
        m, lanes = self.geometry.tile, self.geometry.lanes
        if (step + 1) * m <= self.samples // lanes:  # the shortest lane
            return [m] * lanes
        return [min(max(self.lane_length(c) - step * m, 0), m) for c in range(lanes)]

    def consumed(self, step: int) -> int:
        """Samples of this epoch used up before `step`."""
        m, lanes = self.geometry.tile, self.geometry.lanes
        if step * m <= self.samples // lanes:
            return step * m * lanes
        return sum(min(self.lane_length(c), step * m) for c in range(lanes))

    def tile(self, step: int, lane: int) -> Ids:
        """(n,) int64 ids of a lane's tile at a step, n <= m. O(window), whatever the step: no replay."""
        m = self.geometry.tile
        return self.lane_slice(lane, step * m, (step + 1) * m)

    def lane_slice(self, lane: int, start: int, stop: int) -> Ids:
        """(stop - start,) ids at positions start..stop of a lane, cut at the lane's end."""
        stop = min(stop, self.lane_length(lane))
        pieces: list[Ids] = []
        cuts = self._cuts_of(lane)
        window = int(np.searchsorted(cuts, start, side="right")) - 1
        while start < stop:
            begin, end = int(cuts[window]), int(cuts[window + 1])
            take = min(stop, end)
            if take > start:
                pieces.append(self._window(lane, window).ids(start - begin, take - begin))
            start, window = max(start, take), window + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def lane_shards(self, lane: int) -> Ids:
        """The shards a lane reads, in the order in which their windows come. Empty shards are left out."""
        first, last = self._shard_range(lane)
        shards = self._shards[first:last]
        return shards[self.counts[shards] > 0]

    def lane_needs(self, lane: int) -> list[tuple[int, int, int]]:
        """(shard, first step, last step) of each shard that a lane reads, in the order in which it begins to."""
        cuts, places, m = self._cuts_of(lane), self._places(lane), self.geometry.tile
        needs = []
        for window, (begin, end) in enumerate(pairwise(places)):
            first, last = int(cuts[window]) // m, (int(cuts[window + 1]) - 1) // m
            needs += [(int(shard), first, last) for shard in self._shards[begin:end] if self.counts[shard]]
        return needs

    def _shard_range(self, lane: int) -> tuple[int, int]:
        """The places first..last in the permuted list of the shards that overlap the lane."""
        low, high = self._cuts[lane], self._cuts[lane + 1]
        if low == high:
            return 0, 0
        first = int(np.searchsorted(self._ends, low, side="right"))
        return first, int(np.searchsorted(self._ends, high, side="left")) + 1

    def _places(self, lane: int) -> list[int]:
        """(W + 1,) where the lane's windows begin and end in the permuted list of shards.

        About `window_shards` each, equally many to one: what is left over would make a last window that mixes little.
        """
        first, last = self._shard_range(lane)
        windows = max(round((last - first) / self.window_shards), 1)
        return [first + (last - first) * i // windows for i in range(windows + 1)]

    def _cuts_of(self, lane: int) -> Ids:
        """(W + 1,) positions in the lane at which its windows begin and end."""
        cuts = self._window_cuts.get(lane)
        if cuts is None:
            low, high = self._cuts[lane], self._cuts[lane + 1]
            inside = self._ends[np.array(self._places(lane)[1:-1], dtype=np.int64) - 1] - low
            cuts = self._window_cuts[lane] = np.concatenate([[0], inside, [high - low]]).astype(np.int64)
        return cuts

    def _window(self, lane: int, window: int) -> _Window:
        """A window of a lane. One a lane is kept: what comes after a window does not need it any more."""
        number, kept = self._kept.get(lane, (-1, None))
        if kept is None or number != window:
            kept = self._make_window(lane, window)
            self._kept[lane] = (window, kept)
        return kept

    def _make_window(self, lane: int, window: int) -> _Window:
        low, high = self._cuts[lane], self._cuts[lane + 1]
        places = slice(*self._places(lane)[window : window + 2])
        shards, ends = self._shards[places], self._ends[places]
        begins = ends - self.counts[shards]
        start, stop = np.maximum(begins, low), np.minimum(ends, high)  # the lane's part of each shard
        offsets = np.concatenate([[0], np.cumsum(stop - start)])
        order = permutation(int(offsets[-1]), self.seed, _WINDOW, self.epoch, lane, window)
        return _Window(order.astype(np.uint32), offsets[:-1], self._first_id[shards] + (start - begins))


@dataclass(frozen=True)
class _Window:
    """A shuffled window in 4 bytes a sample: a rank may hold many."""

    order: NDArray[np.uint32]  # (n,) the window's permutation
    offsets: Ids  # (w,) where each of its shards begins in the window, before shuffling
    first_ids: Ids  # (w,) the id of that sample

    def ids(self, start: int, stop: int) -> Ids:
        """(stop - start,) sample ids at these positions."""
        before = self.order[start:stop].astype(np.int64)
        shard = np.searchsorted(self.offsets, before, side="right") - 1
        return self.first_ids[shard] + (before - self.offsets[shard])


def evaluation_tiles(samples: int, tile: int) -> list[tuple[int, int]]:
    """(start, stop) of the fixed tiles of an evaluation, in id order; tile t belongs to rank t mod R."""
    return [(start, min(start + tile, samples)) for start in range(0, samples, tile)]
