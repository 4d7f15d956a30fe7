"""Balanced sampling: every sample its due times, the same stream for any ranks, and each repeat another draw."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from split_files import make_split, read_split

from distcnn.augment import Augment
from distcnn.data.balance import KINDS, Balance, BalancedOrder, turns
from distcnn.data.loader import Loader, Tile, TileRequest, training_requests
from distcnn.data.nvjpeg import NvjpegLoader
from distcnn.data.order import OCCURRENCES, SAMPLES, EpochOrder, Geometry, every_time, nth_time, sample_of
from distcnn.data.shards import SplitReader
from distcnn.data.views import View
from distcnn.errors import DataError
from distcnn.state import Ledger, repeated_digest

TURNS = [  # images of the classes, turns by sample, by sample-sqrt
    ([], [], []),
    ([0, 0], [0, 0], [0, 0]),
    ([7], [7], [7]),
    ([5, 5, 5], [5, 5, 5], [5, 5, 5]),
    ([100, 1], [100, 100], [100, 10]),
    ([100, 25, 0, 4], [100, 100, 0, 100], [100, 50, 0, 20]),
    ([10, 7], [10, 10], [10, 8]),  # root of 70 is 8.4
]


@pytest.mark.parametrize(("counts", "sample", "root"), TURNS)
def test_turns_of_the_classes(counts: list[int], sample: list[int], root: list[int]) -> None:
    assert turns(counts, "sample").tolist() == sample and turns(counts, "sample-sqrt").tolist() == root


LABELS = st.lists(st.integers(0, 4), max_size=60)


@settings(max_examples=80, deadline=None)
@given(LABELS, st.sampled_from(KINDS), st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 40))
@example([0] * 7 + [1] * 3, "sample", 0, 0, 3)
def test_an_epoch_gives_each_class_its_turns_and_epochs_give_each_image_as_many(
    labels: list[int], kind: str, seed: int, first: int, epochs: int
) -> None:
    own = np.array(labels, dtype=np.int64)
    counts = np.bincount(own, minlength=5)
    balance = Balance(own, 5, kind, seed)
    total = np.zeros(len(own), dtype=np.int64)
    for epoch in range(first, first + epochs):
        times = balance.times(epoch)
        wanted = turns(counts, kind)
        assert np.bincount(own, weights=times, minlength=5).astype(int).tolist() == wanted.tolist()
        assert times.sum() == balance.samples, "epochs are equally long"
        assert times.max(initial=0) <= balance.most
        for label in np.flatnonzero(counts):
            some = times[own == label]
            assert some.min() >= 1 and some.max() - some.min() <= 1
        total += times
        for label in np.flatnonzero(counts):
            some = total[own == label]
            assert some.max() - some.min() <= 1, "over any number of epochs as often, to one"
    assert np.array_equal(Balance(own, 5, kind, seed).times(first), balance.times(first)), "no history enters"


SETS = st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=9)  # the labels of each shard


def order_of(shards: list[list[int]], kind: str, geometry: Geometry, epoch: int, window: int) -> BalancedOrder:
    labels = np.array([label for shard in shards for label in shard], dtype=np.int64)
    counts = np.array([len(shard) for shard in shards], dtype=np.int64)
    return Balance(labels, 5, kind, 7).order(counts, geometry, 7, epoch, window)


def stream(order: EpochOrder, lanes: range | None = None, first: int = 0) -> np.ndarray:
    lanes = range(order.geometry.lanes) if lanes is None else lanes
    tiles = [request.ids for step in training_requests(order, lanes, first) for request in step]
    return np.concatenate([np.empty(0, dtype=np.int64), *tiles])


@settings(max_examples=80, deadline=None)
@given(SETS, st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 50))
@example([[0, 0, 0, 0, 0, 0, 0, 0, 1]], "sample", 8, 2, 1, 0)  # one shard, many lanes
def test_every_time_comes_exactly_once(
    shards: list[list[int]], kind: str, lanes: int, tile: int, window: int, epoch: int
) -> None:
    order = order_of(shards, kind, Geometry(lanes * tile, tile), epoch, window)
    labels = np.array([label for shard in shards for label in shard], dtype=np.int64)
    times = Balance(labels, 5, kind, 7).times(epoch)
    found = stream(order)
    assert np.array_equal(np.sort(found), np.sort(every_time(times)))
    assert order.samples == len(found) == times.sum()
    before = {sample: set() for sample in range(len(labels))}
    for sample, time in zip(sample_of(found).tolist(), (found >> 36).tolist(), strict=True):
        before[sample].add(time)
    assert all(before[sample] == set(range(number)) for sample, number in enumerate(times.tolist()))
    assert [len(order.tile(step, lane)) for step in range(order.steps) for lane in range(lanes)] == [
        size for step in range(order.steps) for size in order.tile_sizes(step)
    ]


@settings(max_examples=50, deadline=None)
@given(SETS, st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.data())
def test_killed_anywhere_under_any_ranks_the_one_stream_goes_on(
    shards: list[list[int]], kind: str, lanes: int, tile: int, window: int, data: st.DataObject
) -> None:
    geometry = Geometry(lanes * tile, tile)
    whole = order_of(shards, kind, geometry, 3, window)
    kill = data.draw(st.integers(0, whole.steps))
    pieces = []
    for first, last, ranks in ((0, kill, data.draw(st.integers(1, lanes))), (kill, whole.steps, lanes)):
        feeds = [
            training_requests(order_of(shards, kind, geometry, 3, window), geometry.lanes_of(rank, ranks), first)
            for rank in range(ranks)
        ]
        for _ in range(first, last):
            pieces += [request.ids for feed in feeds for request in next(feed)]
    assert np.array_equal(np.concatenate([np.empty(0, dtype=np.int64), *pieces]), stream(whole))


@settings(max_examples=50, deadline=None)
@given(SETS, st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3))
def test_a_lane_reads_what_it_says_it_needs(
    shards: list[list[int]], kind: str, lanes: int, tile: int, window: int
) -> None:
    order = order_of(shards, kind, Geometry(lanes * tile, tile), 2, window)
    ends = np.cumsum([len(shard) for shard in shards])
    for lane in range(lanes):
        spans = {shard: (first, last) for shard, first, last in order.lane_needs(lane)}
        assert sorted(spans) == sorted(order.lane_shards(lane).tolist())
        for step in range(order.steps):
            for shard in np.searchsorted(ends, sample_of(order.tile(step, lane)), side="right").tolist():
                assert spans[shard][0] <= step <= spans[shard][1]


def test_lanes_share_the_repeats_of_an_image_in_one_shard() -> None:
    """One shard of 400 images, one of them rare: its 399 times lie in all 8 lanes, about as often."""
    labels = [0] * 399 + [1]
    order = order_of([labels], "sample", Geometry(64, 8), 0, 0)
    rare = [int((sample_of(order.lane_slice(lane, 0, order.lane_length(lane))) == 399).sum()) for lane in range(8)]
    assert sum(rare) == 399 and min(rare) > 25, rare


def test_a_balanced_set_is_an_ordinary_one() -> None:
    order = order_of([[0, 1, 2], [2, 1, 0], [3, 3, 4, 4]], "sample", Geometry(4, 2), 5, 1)
    assert sorted(stream(order).tolist()) == list(range(10))


# Pinned: another value here changes every balanced run.
PINNED_TIMES = [[1, 1, 1, 1, 1, 1, 1, 3, 4, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 4, 3, 3, 2, 2]]
PINNED_ORDER = [
    (7, 1),
    (3, 0),
    (9, 1),
    (8, 2),
    (11, 1),
    (7, 0),
    (4, 0),
    (11, 2),
    (11, 0),
    (5, 0),
    (8, 3),
    (10, 0),
    (1, 0),
    (2, 0),
    (8, 0),
    (6, 0),
    (7, 2),
    (8, 1),
    (0, 0),
    (9, 0),
    (10, 1),
]  # (sample, times before)


def test_times_and_order_are_pinned() -> None:
    balance = Balance(np.array([0] * 7 + [1] * 2 + [2] * 3), 3, "sample", 42)
    assert [balance.times(epoch).tolist() for epoch in (0, 1)] == PINNED_TIMES
    ids = stream(balance.order(np.array([5, 0, 7]), Geometry(6, 2), 42, 0))
    assert list(zip(sample_of(ids).tolist(), (ids >> 36).tolist(), strict=True)) == PINNED_ORDER


def test_ids_fit_whatever_is_made_of_them() -> None:
    last = nth_time(np.array([SAMPLES - 1]), np.array([OCCURRENCES - 1]))
    assert sample_of(last).tolist() == [SAMPLES - 1]
    assert int(last[0]) * 10 + 9 < 2**63, "draws by rejection take ten times an id and the attempt"
    assert nth_time(np.arange(5), np.zeros(5, dtype=np.int64)).tolist() == [0, 1, 2, 3, 4]


def test_a_class_that_is_too_rare_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.balance.OCCURRENCES", 8)
    Balance(np.array([0] * 8 + [1]), 2, "sample", 0)
    with pytest.raises(DataError, match="--balance sample: an image would come 9 times in an epoch"):
        Balance(np.array([0] * 9 + [1]), 2, "sample", 0)


COUNTS = (30, 1, 0, 17)
REPEATED = np.array([3, 7, 3 | 1 << 36, 7 | 2 << 36, 47, 47 | 1 << 36])
FIRST = np.array([3, 7, 3, 7, 47, 47])


@pytest.fixture(scope="module", params=["mixed", "square"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, or of 12x12."""
    folder = tmp_path_factory.mktemp(request.param)
    make_split(folder, COUNTS, ((12, 12), (20, 9), (40, 40)) if request.param == "mixed" else ((12, 12),))
    return folder


def tile_of(loader: Loader, ids: np.ndarray) -> Tile:
    (tile,) = next(iter(loader.steps([[TileRequest(4, 0, 0, ids)]])))
    return Tile(tile.request, tile.images.clone(), tile.labels.clone(), tile.weights.clone())


@pytest.mark.parametrize("kind", ["plain", "threads", "cache", "nvjpeg"])
def test_a_repeat_is_cut_anew_and_the_first_time_as_ever(root: Path, kind: str) -> None:
    reader, view = SplitReader(root, read_split(root)), View(10, "random-resized")
    loader = (
        NvjpegLoader(reader, view, 5, 1, 0, torch.device("cpu"))
        if kind == "nvjpeg"
        else Loader(reader, view, 5, 2 if kind == "threads" else 1, 0, (12, 12) if kind == "cache" else None)
    )
    once = tile_of(loader, FIRST)
    for _ in range(2):  # the second time from the cache
        found = tile_of(loader, REPEATED)
        assert torch.equal(found.labels, once.labels) and found.weights.all()
        same = [torch.equal(a, b) for a, b in zip(found.images, once.images, strict=True)]
        assert same == [True, True, False, False, True, False]
    assert reader.keys(REPEATED) == reader.keys(FIRST)
    loader.close()


def test_a_repeat_of_a_whole_image_is_the_image(tmp_path: Path) -> None:
    make_split(tmp_path, COUNTS)
    for cache in (None, (12, 12)):
        loader = Loader(SplitReader(tmp_path, read_split(tmp_path)), View(12, "none"), 5, cache_shape=cache)
        for _ in range(2):
            assert torch.equal(tile_of(loader, REPEATED).images, tile_of(loader, FIRST).images)
        loader.close()


AUGMENTS = {
    "crop": Augment((0.5,) * 3, (0.5,) * 3, 1, padding=4),
    "alternate": Augment((0.5,) * 3, (0.5,) * 3, 1, flip="alternate"),
    "flip": Augment((0.5,) * 3, (0.5,) * 3, 1, flip="random"),
    "trivial": Augment((0.5,) * 3, (0.5,) * 3, 1, trivial=True),
    "jitter": Augment((0.5,) * 3, (0.5,) * 3, 1, jitter=0.4),
    "erasing": Augment((0.5,) * 3, (0.5,) * 3, 1, erasing=1.0),
    "cutout": Augment((0.5,) * 3, (0.5,) * 3, 1, cutout=4),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_repeat_is_augmented_anew_and_the_first_time_as_ever(name: str) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3), dtype=np.uint8))

    def made(ids: np.ndarray) -> torch.Tensor:
        n = len(ids)
        tile = Tile(
            TileRequest(3, 1, 2, ids), image.repeat(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64), torch.ones(n)
        )
        return AUGMENTS[name](tile, torch.device("cpu"), train=True)[0]

    repeats = made(nth_time(np.full(40, 17), np.arange(40)))
    assert torch.equal(repeats[0], made(np.array([17]))[0])
    assert len({row.numpy().tobytes() for row in repeats}) > 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30), st.data())
def test_the_ledger_knows_each_time_and_sees_one_that_is_missing_or_comes_twice(
    times: list[int], data: st.DataObject
) -> None:
    wanted = np.array(times, dtype=np.int64)
    ids = every_time(wanted)
    assert repeated_digest(wanted, block=4) == repeated_digest(wanted)
    ledger = Ledger()
    for part in np.array_split(np.array(data.draw(st.permutations(ids.tolist())), dtype=np.int64), 3):
        ledger.add(part)
    if len(ids):
        row = ledger.row(2, len(times), wanted)
        assert row["exactly_once"] and row["samples"] == row["expected_samples"] == sum(times)
        assert (row["distinct_samples"], row["times"]) == (len(times), [min(times), max(times)])
        other = ids.copy()
        other[data.draw(st.integers(0, len(ids) - 1))] = ids[0] + (1 << 45)
        wrong = Ledger()
        wrong.add(other)
        assert not wrong.row(2, len(times), wanted)["exactly_once"]
        missing = Ledger()
        missing.add(ids[1:])
        assert not missing.row(2, len(times), wanted)["exactly_once"]


def test_all_labels_are_those_of_the_indexes(tmp_path: Path) -> None:
    make_split(tmp_path, COUNTS)
    reader = SplitReader(tmp_path, read_split(tmp_path))
    assert reader.all_labels().tolist() == reader.labels(np.arange(len(reader))).tolist()
    assert Counter(reader.all_labels().tolist()).total() == sum(COUNTS)
