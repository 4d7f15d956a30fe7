"""Balanced sampling: images of rare classes come several times an epoch, each time augmented anew. numpy only.

Each class has a number of turns T in an epoch, the same in every epoch, so that its steps are as many: with `sample` as
many as the largest class has images, with `sample-sqrt` the geometric mean of that and of its own (the square-root
sampling of Mahajan et al., "Exploring the limits of weakly supervised pretraining", ECCV 2018). Each of its n images
comes T // n times; T % n of them come once more, which are others in every epoch, in turn: over any number of epochs
the images of a class have come equally often, to one. No image is left out, and all is a function of (seed, epoch,
labels). Repeats lie in the shard of their image, so that a rank reads no more shards than without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distcnn.data.manifest import Split
from distcnn.data.order import OCCURRENCES, SAMPLES, EpochOrder, Geometry, Ids, automatic_window, nth_time, permutation
from distcnn.errors import DataError

KINDS = ("sample", "sample-sqrt")
_TURN, _SPREAD = 3, 4  # purposes of random words, beside those of order.py


def turns(class_counts: Sequence[int] | Ids, kind: str) -> Ids:
    """(K,) how often an epoch shows an image of each class: 0 without images, else at least each of them once."""
    counts = np.asarray(class_counts, dtype=np.int64)
    largest = int(counts.max(initial=0))
    wanted: Ids = np.where(counts > 0, largest, 0)
    if kind == "sample-sqrt":
        wanted = np.rint(np.sqrt(counts * float(largest))).astype(np.int64)
    return wanted


def epoch_samples(split: Split, kind: str) -> int:
    """How many samples an epoch of a training split has, by --balance."""
    return int(turns(split.class_counts, kind).sum()) if kind in KINDS else split.samples


class Balance:
    """How often each sample of a split comes in an epoch. labels: (N,) in the order of the ids, below `classes`.

    Raises DataError where a class is so rare that its repeats cannot be told apart.
    """

    def __init__(self, labels: Ids, classes: int, kind: str, seed: int) -> None:
        self._labels = labels
        self._counts = np.bincount(labels, minlength=classes)  # (K,)
        self._turns = turns(self._counts, kind)
        self.samples = int(self._turns.sum())  # of an epoch
        self.most = int((-(-self._turns // np.maximum(self._counts, 1))).max(initial=0))  # times of one image
        if self.most > OCCURRENCES or len(labels) > SAMPLES:
            raise DataError(
                f"--balance {kind}: an image would come {self.most:,} times in an epoch: leave its class out"
            )
        self._place = np.empty(len(labels), dtype=np.int64)  # of each sample among those of its class, shuffled
        by_class = np.argsort(labels, kind="stable")
        for label, (end, count) in enumerate(zip(np.cumsum(self._counts), self._counts, strict=True)):
            self._place[by_class[end - count : end]] = permutation(int(count), seed, _TURN, 0, label)
        self._kept: tuple[int, Ids] = (-1, np.empty(0, dtype=np.int64))

    def times(self, epoch: int) -> Ids:
        """(N,) int64: how often each sample comes in an epoch."""
        if self._kept[0] != epoch:
            counts = np.maximum(self._counts, 1)
            whole, more = self._turns // counts, self._turns % counts
            since = (self._place - (epoch * more % counts)[self._labels]) % counts[self._labels]
            self._kept = epoch, whole[self._labels] + (since < more[self._labels])
        return self._kept[1]

    def order(self, counts: Ids, geometry: Geometry, seed: int, epoch: int, window_shards: int = 0) -> BalancedOrder:
        """The order of an epoch, over shards of `counts` samples."""
        return BalancedOrder(counts, self.times(epoch), geometry, seed, epoch, window_shards)


class BalancedOrder(EpochOrder):
    """The order of an epoch in which sample i comes times[i] times: that of a set whose shards hold it as often.

    Ids say how often the sample has come before: see order.py. A shard that several lanes share is shuffled before it
    is cut, so that they share the repeats of an image, too.
    """

    def __init__(
        self, counts: Ids, times: Ids, geometry: Geometry, seed: int, epoch: int, window_shards: int = 0
    ) -> None:
        counts = np.asarray(counts, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(times)])  # (N + 1,) the first place of each sample
        of_shards = np.diff(self._starts[np.concatenate([[0], np.cumsum(counts)])])
        super().__init__(of_shards, geometry, seed, epoch, window_shards or automatic_window(counts))
        self._spreads: dict[int, Ids] = {}

    def lane_slice(self, lane: int, start: int, stop: int) -> Ids:
        """(stop - start,) ids at positions start..stop of a lane, cut at the lane's end."""
        places = super().lane_slice(lane, start, stop)
        first, last = self._shard_range(lane)
        for shard in {int(self._shards[at]) for at in (first, last - 1) if last > first}:
            begin, end = self._first_id[shard], self._first_id[shard + 1]
            mine = (begin <= places) & (places < end)
            places[mine] = begin + self._spread(shard)[places[mine] - begin]
        samples = np.searchsorted(self._starts, places, side="right") - 1
        return nth_time(samples, places - self._starts[samples])

    def _spread(self, shard: int) -> Ids:
        """The permutation of a shard's places."""
        if shard not in self._spreads:
            self._spreads[shard] = permutation(int(self.counts[shard]), self.seed, _SPREAD, self.epoch, shard)
        return self._spreads[shard]
