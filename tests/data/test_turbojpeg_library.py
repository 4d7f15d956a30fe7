"""The kernels that call libturbojpeg check what they are told; which library is used, and when it is not."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_files import jpg
from split_files import make_reader

from distcnn.data import turbojpeg
from distcnn.data.fill import Filler
from distcnn.data.resize import SPILL
from distcnn.data.shards import COLUMNS
from distcnn.data.turbojpeg import BOX, ENTRY, make_decoder
from distcnn.data.views import View
from tests.support import check_indices

pytestmark = pytest.mark.usefixtures("libturbojpeg")

HOSTILE: list[Callable[[np.ndarray], Any]] = [
    lambda entry: entry.__setitem__("at", -1),
    lambda entry: entry.__setitem__("at", 10**9),
    lambda entry: entry.__setitem__("size", 0),
    lambda entry: entry.__setitem__("size", 1 << 40),
    lambda entry: entry.__setitem__("height", 25),
    lambda entry: entry.__setitem__("width", 1 << 30),
    lambda entry: entry.__setitem__("height", -24),
    lambda entry: entry.__setitem__("slot", 1),
    lambda entry: entry.__setitem__("slot", -1),
    lambda entry: entry.__setitem__("top", -1),
    lambda entry: entry.__setitem__("top", 1),
    lambda entry: entry.__setitem__("left", -1),
    lambda entry: entry.__setitem__("left", 1),
    lambda entry: entry.__setitem__("high", 0),
    lambda entry: entry.__setitem__("high", 25),
    lambda entry: entry.__setitem__("wide", 0),
    lambda entry: entry.__setitem__("wide", 25),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_the_kernel_itself_checks_what_it_is_told(number: int, tmp_path: Path) -> None:
    """Whatever the tables of the caller say, nothing outside of them is written."""
    data = jpg(1, 24, 24)
    fill_slots, read_files = turbojpeg.fill_kernel(), turbojpeg.read_kernel()
    assert fill_slots is not None and read_files is not None
    entry = np.zeros(1, dtype=ENTRY)
    for name, value in {"size": len(data), "height": 24, "width": 24, "high": 24, "wide": 24}.items():
        entry[name] = value
    memory = np.full((3, 24, 24, 3), 7, dtype=np.uint8)
    pixels, done = np.zeros(24 * 24 * 3 + SPILL, dtype=np.uint8), np.zeros(1, dtype=np.bool_)
    encoded, handle = np.frombuffer(data, dtype=np.uint8).copy(), make_decoder()
    assert handle is not None
    rows = entry.view(np.int64).reshape(1, -1)
    fill_slots(handle._handle, rows, encoded, pixels, memory[1:2], done)
    assert done[0] and memory[1].any()
    memory[:] = 7
    HOSTILE[number](entry)
    fill_slots(handle._handle, rows, encoded, pixels, memory[1:2], done)
    assert not done[0] and (memory[[0, 2]] == 7).all()
    entry["height"] = 5
    entry["file"] = -1
    read_files(rows, encoded)
    assert entry["height"] == 0


def test_reading_checks_where_it_writes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpg(1, 24, 24))
    size = (tmp_path / "a.jpg").stat().st_size
    read_files = turbojpeg.read_kernel()
    assert read_files is not None
    memory = np.full(3 * size, 7, dtype=np.uint8)
    file = os.open(tmp_path / "a.jpg", os.O_RDONLY)
    for at, length, height in ((0, size, 24), (1, size, 0), (-1, size, 0), (0, 0, 0), (0, -1, 0), (0, size - 200, 24)):
        entry = np.zeros(1, dtype=ENTRY)
        entry["file"], entry["at"], entry["size"] = file, at, length
        read_files(entry.view(np.int64).reshape(1, -1), memory[size : 2 * size])
        assert entry["height"] == height
    os.close(file)
    assert (memory[:size] == 7).all() and (memory[2 * size :] == 7).all()


def test_the_columns_are_those_of_the_kernels() -> None:
    from distcnn import numba_kernels

    assert ENTRY.names is not None
    for number, name in enumerate(ENTRY.names):
        column = {"high": "HIGH", "wide": "WIDE"}.get(name, name.upper())
        assert getattr(numba_kernels, column) == number
    assert ENTRY.names[-4:] == BOX
    assert set(COLUMNS.names or ()) >= {"offset", "size"}


CHECKED = """
import io, os
import numpy as np
from PIL import Image
from distcnn.data import turbojpeg
from distcnn.data.shards import COLUMNS

decoder = turbojpeg.make_decoder()  # which fills all kinds of slots
assert decoder is not None
out = io.BytesIO()
Image.new("RGB", (24, 24)).save(out, "JPEG")
data, rng, plain = out.getvalue(), np.random.default_rng(1), 0
for number in range(4000):
    damaged = bytearray(data[: rng.integers(1, len(data) if number % 2 else 200)])
    for place in rng.integers(0, min(len(damaged), 200), rng.integers(0, 3)):
        damaged[place] = rng.integers(0, 256)
    file = os.memfd_create("damaged")
    os.write(file, damaged)
    columns = np.zeros(1, dtype=COLUMNS)
    columns["size"] = len(damaged)
    plain += int(decoder.read(columns, np.array([file]))["height"][0] > 0)
    os.close(file)
assert 500 < plain < 3500, plain
try:
    turbojpeg.read_kernel()(np.zeros((1, 3), dtype=np.int64), np.zeros(9, dtype=np.uint8))
except IndexError:
    print("checked")
"""


def test_no_index_leaves_its_array(tmp_path: Path) -> None:
    """Compiled with checks of every index, on damaged headers; a table too narrow shows that they are made."""
    check_indices(CHECKED, tmp_path)


class Library:
    """The real one, counted."""

    def __init__(self, real: ctypes.CDLL) -> None:
        self.real, self.made, self.ended = real, list[int](), list[int]()
        self.tjDecompress2 = real.tjDecompress2

    def tjInitDecompress(self) -> int:
        self.made.append(self.real.tjInitDecompress())
        return self.made[-1]

    def tjDestroy(self, handle: int) -> None:
        self.ended.append(handle)
        self.real.tjDestroy(handle)


def test_each_thread_has_a_decoder_and_it_ends_with_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = turbojpeg.libturbojpeg()
    assert real is not None
    counted = Library(real)
    monkeypatch.setattr(turbojpeg, "libturbojpeg", lambda: counted)
    reader = make_reader(tmp_path, (8,), ((24, 24),))
    filler = Filler(reader, 3, None, reduce=True)
    made = len(counted.made)  # in this thread

    def work(filler: Filler) -> None:
        ids = np.arange(8)
        filler.fill(ids, reader.find(ids), np.zeros((8, 24, 24, 3), dtype=np.uint8), 1, View(24, "none"))

    threads = [threading.Thread(target=work, args=(filler,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del filler, threads, thread
    gc.collect()
    assert len(counted.made) == made + 3
    assert sorted(counted.ended) == sorted(counted.made)


def test_a_decoder_for_which_there_is_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = turbojpeg.libturbojpeg()
    assert real is not None
    poor = Library(real)
    monkeypatch.setattr(poor, "tjInitDecompress", lambda: None)
    turbojpeg.fill_kernel()
    monkeypatch.setattr(turbojpeg, "libturbojpeg", lambda: poor)
    with pytest.raises(MemoryError, match="libturbojpeg"):
        make_decoder()


@pytest.fixture
def searched() -> Any:
    turbojpeg.libturbojpeg.cache_clear()
    yield
    turbojpeg.libturbojpeg.cache_clear()


def test_without_the_library_there_is_none(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "SONAME", "libnothing.so.0")
    assert turbojpeg.libturbojpeg() is None and make_decoder() is None


def test_a_library_that_is_another_is_none(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "SONAME", "libc.so.6")
    assert turbojpeg.libturbojpeg() is None


def test_it_is_found_in_the_environment_of_python(
    searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a package manager that needs no root puts it."""
    real = turbojpeg.libturbojpeg()
    assert real is not None
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123  # not a file on a disk
        path = next(line.split()[-1] for line in maps if "libturbojpeg" in line)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmine.so.0").write_bytes(Path(path).read_bytes())
    monkeypatch.setattr(turbojpeg, "SONAME", "libmine.so.0")
    monkeypatch.setattr(turbojpeg.sys, "prefix", str(tmp_path))
    turbojpeg.libturbojpeg.cache_clear()
    found = turbojpeg.libturbojpeg()
    assert found is not None and found._name == str(tmp_path / "lib" / "libmine.so.0")


def test_one_whose_pixels_are_others_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library with another upsampling would give: the check compares, it does not trust."""
    fill_slots = turbojpeg.fill_kernel()
    assert fill_slots is not None
    assert turbojpeg._is_exact(fill_slots)

    def off_by_one(handle: int, rows: np.ndarray, encoded: Any, pixels: Any, slots: np.ndarray, done: Any) -> Any:
        taken = fill_slots(handle, rows, encoded, pixels, slots, done)
        slots[-1, 0, 0, 0] ^= 1
        return taken

    def refuses_one(handle: int, rows: np.ndarray, encoded: Any, pixels: Any, slots: np.ndarray, done: Any) -> Any:
        taken = fill_slots(handle, rows, encoded, pixels, slots, done)
        done[3] = False
        return taken

    assert not turbojpeg._is_exact(off_by_one)
    assert not turbojpeg._is_exact(refuses_one)
