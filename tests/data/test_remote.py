"""Remote shards: fetched once a node, through bad servers, checked, ahead of need, evicted when needed last."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import multiprocessing.queues
import os
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from http_files import Server
from split_files import make_split, split_of

from distcnn.data import fetch as fetch_module
from distcnn.data.fetch import TRIES, fetch
from distcnn.data.loader import Loader, training_requests
from distcnn.data.manifest import Shard, Split
from distcnn.data.nodecache import NodeCache
from distcnn.data.order import EpochOrder, Geometry
from distcnn.data.readahead import ReadAhead
from distcnn.data.shards import SplitReader
from distcnn.data.views import View
from distcnn.errors import DataError, UserError

pytest.importorskip("fsspec")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "www"
    folder.mkdir()
    running = Server(folder)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def remote(folder: Path, url: str, split: Split, checksums: bool = True) -> Split:
    """The same split with the shards' names as URLs; indexes stay local."""
    shards = []
    for shard in split.shards:
        data = (folder / shard.name).read_bytes()
        digest = hashlib.sha256(data).hexdigest() if checksums else ""
        shards.append(replace(shard, name=f"{url}/{shard.name}", sha256=digest))
    return split_of(shards)


def no_pause(seconds: float) -> None:
    """In place of waiting."""


@pytest.fixture(autouse=True)
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(fetch_module, "FIRST_PAUSE_SECONDS", 0.001)


FAULTS = [
    [],
    ["503"],
    ["drop"],
    ["503", "503", "drop", "503", "drop"],
    ["drop"] * 4 + ["", "drop"] * 3,
]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: "-".join(faults) or "none")
def test_bad_servers_lose_nothing(server: Server, tmp_path: Path, faults: list[str], ranges: bool) -> None:
    split = make_split(server.folder, [12])
    (shard,) = remote(server.folder, server.url, split).shards
    server.faults[:], server.ranges = faults, ranges
    if not ranges:
        server.faults[:] = faults[: TRIES - 2]
    fetch(shard, tmp_path / "x", no_pause)
    assert (tmp_path / "x").read_bytes() == (server.folder / split.shards[0].name).read_bytes()
    assert not server.faults, "every fault was met"


def test_a_server_that_stays_down_is_named_after_some_tries(server: Server, tmp_path: Path) -> None:
    (shard,) = remote(server.folder, server.url, make_split(server.folder, [3])).shards
    server.faults[:] = ["503"] * 50
    pauses: list[float] = []
    with pytest.raises(DataError, match=rf"train-000000.tar could not be fetched in {TRIES} tries: .*503"):
        fetch(shard, tmp_path / "x", pauses.append)
    assert len(pauses) == TRIES - 1 and pauses == sorted(pauses) and pauses[-1] > 10 * pauses[0]
    assert not (tmp_path / "x").exists()


def test_a_missing_shard_is_named_at_once(server: Server, tmp_path: Path) -> None:
    shard = Shard(f"{server.url}/none.tar", "none.npy", 1, 100)
    with pytest.raises(DataError, match=r"none\.tar is missing"):
        fetch(shard, tmp_path / "x", no_pause)


@pytest.mark.parametrize("ranges", [True, False])
def test_damage_on_the_way_is_found_by_the_checksum(server: Server, tmp_path: Path, ranges: bool) -> None:
    (shard,) = remote(server.folder, server.url, make_split(server.folder, [3])).shards
    server.faults[:], server.ranges = ["wrong"] * (1 if ranges else 6), ranges
    with pytest.raises(DataError, match="is not the one that was indexed"):
        fetch(shard, tmp_path / "x", no_pause)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", [-100, 100])
def test_a_shard_of_another_length_is_refused(server: Server, tmp_path: Path, change: int) -> None:
    (shard,) = remote(server.folder, server.url, make_split(server.folder, [3])).shards
    server.ranges = False
    with pytest.raises(DataError, match=r"larger than|could not be fetched"):
        fetch(replace(shard, bytes=shard.bytes + change), tmp_path / "x", no_pause)


def test_a_full_disk_is_not_blamed_on_the_server(server: Server, tmp_path: Path) -> None:
    (shard,) = remote(server.folder, server.url, make_split(server.folder, [3])).shards
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be kept in .*/x: File too large"):
            fetch(shard, tmp_path / "x", no_pause)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "x").exists() and server.served.count("train-000000.tar") < TRIES


def test_shards_of_any_file_system_of_fsspec(tmp_path: Path) -> None:
    import fsspec

    split = make_split(tmp_path / "here", [5, 6])
    memory = fsspec.filesystem("memory")
    for shard in split.shards:
        memory.pipe(f"/set/{shard.name}", (tmp_path / "here" / shard.name).read_bytes())
    there = SplitReader(
        tmp_path / "here", remote(tmp_path / "here", "memory://set", split), NodeCache(tmp_path / "cache")
    )
    assert there.read(np.arange(11)) == SplitReader(tmp_path / "here", split).read(np.arange(11))
    there.close()
    there.cache.close()


# The node's cache.


Answers = multiprocessing.queues.Queue  # of (shards fetched, digest of all that was read)


def take(root: Path, split: Split, folder: Path, ids: list[int], queue: Answers) -> None:
    """A process of the node reads everything."""
    cache = NodeCache(folder)
    data = SplitReader(root, split, cache).read(np.array(ids))
    queue.put((cache.fetched, hashlib.sha256(b"".join(data)).digest()))


def test_processes_of_a_node_fetch_each_shard_once(server: Server, tmp_path: Path) -> None:
    split = make_split(server.folder, [4, 4, 4])
    there = remote(server.folder, server.url, split)
    server.delay = 0.02
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    order = list(range(12))
    processes = [
        context.Process(target=take, args=(server.folder, there, tmp_path / "cache", order, queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(fetched for fetched, _ in answers) == 3
    assert len({digest for _, digest in answers}) == 1
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def test_threads_fetch_each_shard_once(server: Server, tmp_path: Path) -> None:
    split = make_split(server.folder, [4, 4])
    cache = NodeCache(tmp_path / "cache")
    reader = SplitReader(server.folder, remote(server.folder, server.url, split), cache)
    server.delay = 0.01
    threads = [threading.Thread(target=reader.read, args=(np.arange(8),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.fetched == 2
    reader.close()
    cache.close()


def test_a_second_run_finds_the_shards_and_a_damaged_one_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    split = remote(server.folder, server.url, make_split(server.folder, [4, 4]))
    for expected in (2, 0, 1):
        cache = NodeCache(tmp_path / "cache")
        reader = SplitReader(server.folder, split, cache)
        reader.read(np.arange(8))
        assert cache.fetched == expected
        reader.close()
        cache.close()
        if not expected:
            next((tmp_path / "cache").glob("*.tar")).write_bytes(b"cut")


def kept(cache: NodeCache, split: Split) -> list[int]:
    return [number for number, shard in enumerate(split.shards) if cache.has(shard)]


def test_evicted_is_what_is_needed_last_and_not_in_use(server: Server, tmp_path: Path) -> None:
    split = remote(server.folder, server.url, make_split(server.folder, [4] * 5))
    size = split.shards[0].bytes
    assert all(shard.bytes == size for shard in split.shards)
    cache = NodeCache(tmp_path / "cache", limit_bytes=3 * size)
    other = NodeCache(tmp_path / "cache", limit_bytes=3 * size)  # another process of the node, as far as files go
    shards = split.shards
    for number in (0, 1, 2):
        os.close(cache.open(shards[number]))
    assert kept(cache, split) == [0, 1, 2]
    cache.need({shards[0]: 5, shards[1]: 9, shards[2]: 7, shards[3]: 6})
    assert not cache.fetch_ahead(shards[4]), "nobody needs it"
    other.need({shards[1]: 2})
    assert not cache.fetch_ahead(replace(shards[3], bytes=size + 1)), "it would take two"
    assert cache.fetch_ahead(shards[3]), "in place of 2: the other process needs 1 sooner"
    assert kept(cache, split) == [0, 1, 3]
    other.need({})
    descriptor = cache.open(shards[1])
    os.close(cache.open(shards[4]))
    assert kept(cache, split) == [0, 1, 4], "1 is in use"
    os.close(descriptor)
    cache.close()
    other.close()


def test_the_plan_of_a_dead_process_does_not_count(server: Server, tmp_path: Path) -> None:
    split = remote(server.folder, server.url, make_split(server.folder, [4] * 2))
    cache = NodeCache(tmp_path / "cache", limit_bytes=split.shards[0].bytes)
    os.close(cache.open(split.shards[0]))
    name = next((tmp_path / "cache").glob("*.tar")).name
    dead = tmp_path / "cache" / "999999-0.plan"
    dead.write_text(f'{{"{name}": 0}}')
    with dead.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.need({split.shards[1]: 3})
        assert not cache.fetch_ahead(split.shards[1])
    assert cache.fetch_ahead(split.shards[1])
    assert not dead.exists()
    cache.close()


def test_what_a_killed_process_left_of_a_shard_does_not_count(server: Server, tmp_path: Path) -> None:
    split = remote(server.folder, server.url, make_split(server.folder, [4] * 2))
    cache = NodeCache(tmp_path / "cache", limit_bytes=split.shards[0].bytes)
    left = tmp_path / "cache" / f"{'0' * 32}.{split.shards[0].bytes}.part"
    left.touch()
    with left.with_name(f"{'0' * 32}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not cache.fetch_ahead(split.shards[0]), "it is under way, and counts"
    assert cache.fetch_ahead(split.shards[0])
    assert not left.exists()
    cache.close()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is not a folder of yours"):
        NodeCache(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set TMPDIR"):
        NodeCache(tmp_path / "file")


# Read-ahead.


def test_an_epoch_from_a_cache_smaller_than_the_set(server: Server, tmp_path: Path) -> None:
    """Every sample once, through a cache of 4 shards of 12; each shard is fetched once, and most of them ahead."""
    split = make_split(server.folder, [6] * 12)
    there = remote(server.folder, server.url, split)
    cache = NodeCache(tmp_path / "cache", limit_bytes=4 * split.shards[0].bytes + 100)
    reader = SplitReader(server.folder, there, cache)
    loader = Loader(reader, View(12, "none"), 0, threads=2, prefetch=1)
    order = EpochOrder(reader.counts, Geometry(4, 2), 0, 0, 1)
    seen: list[int] = []
    for tiles in loader.steps(training_requests(order, range(2))):
        seen += [int(i) for tile in tiles for i in tile.request.ids]
        assert all((tile.weights == 1).all() for tile in tiles)
        assert len(list((tmp_path / "cache").glob("*.tar"))) <= 5
    assert sorted(seen) == list(range(72))
    assert cache.fetched == 12
    loader.close()
    cache.close()


def test_shards_come_in_the_order_of_need_and_ahead_of_it(server: Server, tmp_path: Path) -> None:
    split = make_split(server.folder, [6] * 8)
    cache = NodeCache(tmp_path / "cache")
    reader = SplitReader(server.folder, remote(server.folder, server.url, split), cache)
    order = EpochOrder(reader.counts, Geometry(2, 2), 0, 0, 1)
    ahead = ReadAhead(reader, order, range(1), first_step=3)
    deadline = time.monotonic() + 20
    expected = order.lane_shards(0)[1:]  # three steps are the first shard
    while cache.fetched < len(expected) and time.monotonic() < deadline:
        time.sleep(0.01)
    ahead.stop()
    assert kept(cache, reader.split) == sorted(expected.tolist()), "all that is still needed, and nothing else"
    first_seen = list(dict.fromkeys(server.served))
    place = {f"train-{shard:06d}.tar": number for number, shard in enumerate(expected.tolist())}
    assert all(abs(place[name] - number) < 4 for number, name in enumerate(first_seen)), "four at a time, in order"
    cache.close()


def test_a_shard_that_cannot_be_had_costs_its_samples_and_no_more(server: Server, tmp_path: Path) -> None:
    split = make_split(server.folder, [5, 5, 5])
    there = remote(server.folder, server.url, split)
    (server.folder / "train-000001.tar").unlink()
    cache = NodeCache(tmp_path / "cache")
    loader = Loader(SplitReader(server.folder, there, cache), View(12, "none"), 0, threads=2, prefetch=2)
    order = EpochOrder(loader.reader.counts, Geometry(5, 5), 0, 0)
    weights = {}
    for (tile,) in loader.steps(training_requests(order, range(1))):
        weights |= dict(zip(tile.request.ids.tolist(), tile.weights.tolist(), strict=True))
    assert {sample for sample, weight in weights.items() if not weight} == set(range(5, 10))
    assert all("is missing" in bad.reason for bad in loader.stats.bad)
    loader.close()
    cache.close()


def test_what_a_lane_needs_is_what_it_reads() -> None:
    counts = np.array([3, 0, 7, 1, 40, 2, 9, 9, 9])
    for window in (1, 2, 5):
        order = EpochOrder(counts, Geometry(6, 2), 1, 0, window)
        first_ids = np.concatenate([[0], np.cumsum(counts)])
        for lane in range(3):
            needs = {shard: (first, last) for shard, first, last in order.lane_needs(lane)}
            read: dict[int, list[int]] = {}
            for step in range(order.steps):
                for sample in order.tile(step, lane).tolist():
                    read.setdefault(int(np.searchsorted(first_ids, sample, "right") - 1), []).append(step)
            assert set(read) == set(needs)
            for shard, steps in read.items():
                assert needs[shard][0] <= min(steps) and max(steps) <= needs[shard][1]
