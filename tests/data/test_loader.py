"""What comes out of the loader: every sample once, the same order and pixels whatever the ranks and threads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import jpg, picture
from split_files import CLASSES, make_reader, make_split, read_split

from distcnn.data.decode import decode
from distcnn.data.loader import BadSample, Loader, Tile, TileRequest, training_requests
from distcnn.data.order import EpochOrder, Geometry
from distcnn.data.shards import SplitReader
from distcnn.data.views import ProgressiveView, View

COUNTS = (30, 1, 0, 17, 64, 2, 9)  # 123 samples
SIZES = ((12, 12), (20, 9), (7, 31), (40, 40))
GEOMETRY = Geometry(24, 3)  # 8 lanes
CROP = View(10, "random-resized")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    make_split(folder, COUNTS, SIZES)
    return folder


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 12x12."""
    folder = tmp_path_factory.mktemp("square")
    make_split(folder, COUNTS)
    return folder


def seen(tile: Tile) -> Iterator[tuple[int, str, int, float]]:
    """(id, hash of the pixels, label, weight) of each sample of a tile; the tile's buffer is soon used again."""
    for place, sample in enumerate(tile.request.ids.tolist()):
        pixels = hashlib.sha256(tile.images[place].numpy().tobytes()).hexdigest()[:16]
        yield sample, pixels, int(tile.labels[place]), float(tile.weights[place])


def reader_of(root: Path) -> SplitReader:
    return SplitReader(root, read_split(root))


def run(
    root: Path, view: View, ranks: int, threads: int = 1, prefetch: int = 0, cache: tuple[int, int] | None = None
) -> list[tuple[int, str, int, float]]:
    """The global stream of an epoch, made by `ranks` loaders that know nothing of each other."""
    loaders = [Loader(reader_of(root), view, 5, threads, prefetch, cache) for _ in range(ranks)]
    feeds = []
    for rank, loader in enumerate(loaders):
        order = EpochOrder(loader.reader.counts, GEOMETRY, 5, 1, 2)
        feeds.append(loader.steps(training_requests(order, GEOMETRY.lanes_of(rank, ranks))))
    out = []
    for step in zip(*feeds, strict=True):
        for tiles in step:
            for tile in tiles:
                out += list(seen(tile))
    for loader in loaders:
        loader.close()
    return out


@pytest.fixture(scope="module")
def alone(root: Path) -> list[tuple[int, str, int, float]]:
    return run(root, CROP, ranks=1)


def test_one_rank_sees_every_sample_once(alone: list[tuple[int, str, int, float]]) -> None:
    assert sorted(sample for sample, *_ in alone) == list(range(sum(COUNTS)))
    assert all(label == sample % CLASSES and weight == 1 for sample, _, label, weight in alone)
    assert len({pixels for _, pixels, _, _ in alone}) == len(alone), "pictures differ, or the hashes prove nothing"


@pytest.mark.parametrize(
    ("ranks", "threads", "prefetch"),
    [(2, 1, 0), (3, 1, 0), (4, 1, 0), (8, 1, 0), (1, 2, 0), (1, 1, 2), (1, 5, 3), (3, 2, 1), (8, 3, 4)],
)
def test_same_stream_and_pixels_for_any_ranks_and_threads(
    root: Path, alone: list[tuple[int, str, int, float]], ranks: int, threads: int, prefetch: int
) -> None:
    assert run(root, CROP, ranks, threads, prefetch) == alone


@pytest.mark.parametrize("view", [View(12, "none"), View(12, "random-resized"), View(8, "center")])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_cache_changes_no_pixel(square: Path, view: View, threads: int) -> None:
    assert run(square, view, 2, threads, 0, (12, 12)) == run(square, view, 1)


def test_a_second_epoch_from_the_cache_gives_the_same_pixels(square: Path) -> None:
    loader = Loader(reader_of(square), View(12, "none"), 0, cache_shape=(12, 12))
    order = EpochOrder(loader.reader.counts, GEOMETRY, 5, 0)
    first, second = (
        [row for tiles in loader.steps(training_requests(order, range(8))) for tile in tiles for row in seen(tile)]
        for _ in range(2)
    )
    assert first == second


def test_pixels_are_those_of_the_decoder(square: Path) -> None:
    loader = Loader(reader_of(square), View(12, "none"), 0)
    ((tile,),) = loader.steps([[TileRequest(0, 0, 0, np.array([3, 100, 3]))]])
    for place, sample in enumerate((3, 100, 3)):
        assert np.array_equal(tile.images[place].numpy(), decode(jpg(sample, 12, 12)))
    assert np.abs(tile.images[0].numpy().astype(int) - picture(3, 12, 12)).mean() < 16, "and look like the picture"


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_resuming_at_a_step_gives_the_same_rest(
    root: Path, alone: list[tuple[int, str, int, float]], first: int
) -> None:
    loader = Loader(reader_of(root), CROP, 5, threads=2, prefetch=2)
    order = EpochOrder(loader.reader.counts, GEOMETRY, 5, 1, 2)
    feed = loader.steps(training_requests(order, range(8), first))
    rest = [row for tiles in feed for tile in tiles for row in seen(tile)]
    assert rest == alone[order.consumed(first) :]
    loader.close()


def test_ranks_without_samples_get_empty_tiles(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, [1])
    geometry = Geometry(8, 1)
    order = EpochOrder(reader.counts, geometry, 0, 0)
    tiles = [t for step in Loader(reader, CROP, 0).steps(training_requests(order, range(8))) for t in step]
    assert sorted(len(tile.labels) for tile in tiles) == [0] * 7 + [1]
    assert all(tile.images.shape == (len(tile.labels), 10, 10, 3) for tile in tiles)


def test_no_requests_no_steps(square: Path) -> None:
    loader = Loader(reader_of(square), CROP, 0, threads=2, prefetch=2)
    assert list(loader.steps([])) == []
    loader.close()


# A sample that goes bad after it was indexed keeps its slot, with weight 0, and is named.


def flip_bytes(path: Path, offset: int, count: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in data))


def image_of(reader: SplitReader, sample: int) -> tuple[Path, int, int]:
    """(tar, offset, size) of a sample's image."""
    (shard,), (row,) = reader.locate(np.array([sample]))
    entry = reader.index(int(shard))[row]
    return reader.root / reader.split.shards[shard].name, int(entry["offset"]), int(entry["size"])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("fault", ["truncated shard", "flipped bytes", "vanished shard", "zeros"])
def test_bad_samples_keep_their_slot_with_weight_0_and_are_named(tmp_path: Path, fault: str, threads: int) -> None:
    reader = make_reader(tmp_path, [4, 6, 5])
    tar, offset, size = image_of(reader, 8)
    if fault == "truncated shard":
        with tar.open("r+b") as file:
            file.truncate(offset + size // 2)
        bad = {8, 9}
    elif fault == "vanished shard":
        tar.unlink()
        bad = set(range(4, 10))
    else:
        flip_bytes(tar, offset, 40 if fault == "flipped bytes" else size)
        bad = {8}
    told: list[BadSample] = []
    loader = Loader(reader, View(12, "none"), 0, threads, prefetch=2)
    loader.on_bad = told.append
    order = EpochOrder(reader.counts, Geometry(6, 3), 0, 0)
    rows = []
    for tiles in loader.steps(training_requests(order, range(2))):
        for tile in tiles:
            rows += list(seen(tile))
            for place, weight in enumerate(tile.weights.tolist()):
                assert weight == 1 or not tile.images[place].any(), "no pixels of an earlier batch in a bad slot"
    loader.close()
    assert sorted(sample for sample, *_ in rows) == list(range(15))
    assert {sample for sample, _, _, weight in rows if weight == 0} == bad
    assert {int(entry.key) for entry in told} == bad == {int(entry.key) for entry in loader.stats.bad}
    assert {entry.shard for entry in told} == {"train-000001.tar"}
    assert all(entry.reason for entry in told)
    if fault == "truncated shard":
        assert all("was cut after it was indexed" in entry.reason for entry in told)


def test_an_image_of_another_size_than_the_set_has_is_scaled_and_not_cached(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, [5], ((12, 12), (12, 12), (12, 13)))
    seen_by = []
    for cache in (None, (12, 12)):
        loader = Loader(reader, View(12, "none"), 0, cache_shape=cache)
        for _ in range(2):
            ((tile,),) = loader.steps([[TileRequest(0, 0, 0, np.arange(5))]])
            seen_by.append(list(seen(tile)))
            assert tile.weights.tolist() == [1] * 5
    assert all(rows == seen_by[0] for rows in seen_by)


def test_the_epoch_chooses_the_size(square: Path) -> None:
    """The pixels are those of a loader of that size alone, whatever came before, prefetched or not."""
    reader = reader_of(square)
    progressive = Loader(reader, ProgressiveView.of((6, 10), 4, 0.5), 5, threads=2, prefetch=2)
    for epoch, side in ((0, 6), (3, 10), (1, 6)):
        alone = Loader(reader, View(side, "random-resized", 0.5), 5)
        requests = list(training_requests(EpochOrder(reader.counts, Geometry(16, 4), 5, epoch), range(4)))
        for mine, wanted in zip(progressive.steps(requests), alone.steps(requests), strict=True):
            for tile, other in zip(mine, wanted, strict=True):
                assert tile.images.shape[1:] == (side, side, 3) and torch.equal(tile.images, other.images)
