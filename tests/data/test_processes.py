"""Decoding in processes: the same tiles as by threads, and no process left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from split_files import make_split, read_split

from distcnn.data.loader import Loader, training_requests
from distcnn.data.order import EpochOrder, Geometry
from distcnn.data.shards import SplitReader
from distcnn.data.shared import Mappings, SharedMemory
from distcnn.data.views import ProgressiveView, View
from distcnn.errors import LostRank, UserError
from distcnn.train import train
from distcnn.world import World
from tests.harness import small_config

COUNTS = (30, 1, 0, 17, 64)
SIZES = ((12, 12), (20, 9), (7, 31), (40, 40))
GEOMETRY = Geometry(24, 12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    make_split(folder, COUNTS, SIZES)
    return folder


def epochs(loader: Loader, count: int = 2) -> list[list[torch.Tensor]]:
    """Images, labels and weights of every tile of some epochs."""
    out = []
    for epoch in range(count):
        order = EpochOrder(loader.reader.counts, GEOMETRY, 5, epoch, 2)
        for tiles in loader.steps(training_requests(order, range(2))):
            out += [[tile.images.clone(), tile.labels.clone(), tile.weights.clone()] for tile in tiles]
    return out


def assert_equal(some: list[list[torch.Tensor]], others: list[list[torch.Tensor]]) -> None:
    assert len(some) == len(others) > 0
    for tile, other in zip(some, others, strict=True):
        assert all(map(torch.equal, tile, other))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("view", [View(10, "random-resized"), ProgressiveView.of((8, 16), 2, 0.5)])
def test_the_tiles_are_those_of_threads(root: Path, view: View, prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.loader.MIN_CHUNK_PIXELS", 100)  # several tasks a step
    reader = SplitReader(root, read_split(root))
    expected = epochs(Loader(reader, view, 5))
    loader = Loader(reader, view, 5, prefetch=prefetch, processes=2)
    assert_equal(epochs(loader), expected)
    assert loader.stats.samples == 2 * sum(COUNTS) and loader.stats.decode_seconds > 0
    loader.close()


def test_a_bad_sample_is_named_and_black(tmp_path: Path) -> None:
    make_split(tmp_path, (6, 5))
    reader = SplitReader(tmp_path, read_split(tmp_path))
    row = reader.index(0)[2]
    with (tmp_path / read_split(tmp_path).shards[0].name).open("r+b") as tar:
        tar.seek(int(row["offset"]))
        tar.write(bytes(int(row["size"])))
    loader = Loader(reader, View(10, "random-resized"), 5, processes=2)
    tiles = epochs(loader, 1)
    assert [(bad.key, bad.shard) for bad in loader.stats.bad] == [(row["key"].decode(), "train-000000.tar")]
    black = [(images[place], weights[place]) for images, _, weights in tiles for place in np.flatnonzero(weights == 0)]
    assert len(black) == 1 and not black[0][0].any()
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_process_that_is_killed_is_told_of(root: Path, prefetch: int) -> None:
    before = set(psutil.Process().children(recursive=True))
    loader = Loader(SplitReader(root, read_split(root)), View(10, "random-resized"), 5, prefetch=prefetch, processes=2)
    steps = loader.steps(training_requests(EpochOrder(loader.reader.counts, GEOMETRY, 5, 0, 2), range(2)))
    next(steps)
    time.sleep(0.3)  # what is prefetched is ready
    workers = [p for p in set(psutil.Process().children(recursive=True)) - before if len(p.parents()) > 1]
    for process in workers:
        if not process.children():  # not the server that they are forked from
            process.send_signal(signal.SIGTERM)  # from here, as the executor sends it
    time.sleep(0.5)  # the loader's next task meets an executor that knows
    with pytest.raises(LostRank, match="fewer --decode-processes"):
        for _ in steps:
            pass
    loader.close()


CHILD = """
import sys, time
from distcnn.data.loader import Loader, training_requests
from distcnn.data.manifest import load_manifest
from distcnn.data.order import EpochOrder, Geometry
from distcnn.data.shards import SplitReader
from distcnn.data.views import View
if __name__ == "__main__":
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from split_files import read_split
    root = Path(sys.argv[1])
    loader = Loader(SplitReader(root, read_split(root)), View(10, "random-resized"), 5, processes=2)
    order = EpochOrder(loader.reader.counts, Geometry(24, 12), 5, 0, 2)
    for number, _ in enumerate(loader.steps(training_requests(order, range(2)))):
        print(number, flush=True)
        if number == 0:
            sys.stdin.readline()
    loader.close()
"""


@pytest.mark.slow
def test_processes_outlive_a_signal_to_all_but_not_the_one_that_trains(root: Path) -> None:
    """SLURM sends SIGTERM to every process of a job step: the run stops when its own process says so."""
    words = [sys.executable, "-c", CHILD, str(root), str(Path(__file__).parent)]
    for killed in (False, True):
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdin and run.stdout and run.stdout.readline() == "0\n"
            below = psutil.Process(run.pid).children(recursive=True)
            workers = [p for p in below if not p.children() and "forkserver" in " ".join(p.cmdline())]
            assert len(workers) >= 2
            if killed:
                run.kill()
            else:
                for worker in workers:
                    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                        worker.send_signal(number)
                run.communicate("\n", timeout=60)
            assert run.wait(60) == (-signal.SIGKILL if killed else 0)
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive


def test_a_run_is_the_same_run(stripes_set: Path, tmp_path: Path) -> None:
    """Trained on crops of 6 of 8 pixels, one epoch; and no process is left."""
    before = set(psutil.Process().children(recursive=True))
    weights = []
    for count in (0, 2):
        more = {"crop": "random-resized", "epochs": 1, "decode_processes": count, "cache": "off"}
        run = tmp_path / str(count)
        train(small_config(stripes_set, run, **more), World())
        weights.append((run / "checkpoints" / "latest" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    left = [p for p in set(psutil.Process().children(recursive=True)) - before if p.parent() != psutil.Process()]
    assert not psutil.wait_procs(left, timeout=20)[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"loader": "stream"}, "needs --loader exact"),
        ({"cache": "host"}, "leave out --cache host"),
        ({"decode": "nvjpeg"}, "needs --decode cpu"),
    ],
)
def test_where_they_cannot_be_had_one_line_says_so(
    more: dict[str, Any], said: str, stripes_set: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--decode-processes .*{said}"):
        train(small_config(stripes_set, tmp_path / "run", decode_processes=2, **more), World())


def test_memory_is_found_again_by_its_address() -> None:
    mappings = Mappings()
    memory = SharedMemory(100)
    seen = mappings.pixels(memory.address)
    memory.pixels[:] = 7
    assert (seen == 7).all() and mappings.pixels(memory.address) is seen
    path = memory.address.path
    del memory
    held = [SharedMemory(50) for _ in range(3)]  # one of them has the descriptor, and so the path, that is free again
    again = next(each for each in held if each.address.path == path)
    again.pixels[:] = 9
    assert len(mappings.pixels(again.address)) == 50 and (mappings.pixels(again.address) == 9).all()
