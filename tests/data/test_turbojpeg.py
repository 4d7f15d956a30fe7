"""Reading and decoding without the interpreter: the same slots and the same complaints as the slower way."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import encode, jpg, picture, write_tar
from split_files import make_reader

from distcnn.data import fill, turbojpeg
from distcnn.data.fill import Filled, Filler
from distcnn.data.manifest import Shard, Split
from distcnn.data.readers import FileReader
from distcnn.data.resize import SPILL
from distcnn.data.shards import COLUMNS, SplitReader, make_index, samples_in
from distcnn.data.turbojpeg import BOX, ENOUGH, ENTRY, MAX_FILE, Decoder, make_decoder
from distcnn.data.views import View
from tests.support import command, skip_or_fail


@pytest.fixture(autouse=True)
def _needs_the_library() -> None:
    if turbojpeg.library() is None:
        skip_or_fail(f"{turbojpeg.SONAME} is not installed (apt-get install libturbojpeg0)")


NONE, CENTER, RANDOM = View(24, "none"), View(24, "center"), View(24, "random-resized")


def decoder() -> Decoder:
    made = make_decoder()
    assert made is not None
    return made


def reader_of(root: Path, files: list[bytes], name: str = "a") -> SplitReader:
    """A shard of these files; the index does not know their sizes in pixels."""
    members = [(f"{place:04d}.{'png' if data[:4] == PNG else 'jpg'}", data) for place, data in enumerate(files)]
    tar = write_tar(root / f"{name}.tar", members)
    samples = [(sample.key, sample.image) for sample in samples_in(tar)]
    rows = [(image.offset, image.size, 0, 0, 0, key) for key, image in samples if image is not None]
    np.save(root / f"{name}.npy", make_index(rows))
    shard = Shard(tar.name, f"{name}.npy", len(rows), tar.stat().st_size)
    return SplitReader(root, Split((shard,), (len(rows),)))


PNG = b"\x89PNG"


def filled_by(reader: SplitReader, view: View, with_decoder: bool) -> tuple[np.ndarray, Filled, Decoder | None]:
    """Slots of all its samples, what was said of them, and who made them."""
    with pytest.MonkeyPatch.context() as patch:
        made = make_decoder() if with_decoder else None
        patch.setattr(fill, "make_decoder", lambda: made)
        filler = Filler(reader, 3, None, reduce=True)
        ids = np.arange(len(reader))
        slots = np.full((len(ids), view.size, view.size, 3), 7, dtype=np.uint8)
        return slots, filler.fill(ids, reader.find(ids), slots, 1, view), made


def check_both_ways(reader: SplitReader, view: View) -> int:
    """That they agree; how many slots the decoder filled."""
    slots, said, made = filled_by(reader, view, True)
    others, other, _ = filled_by(reader, view, False)
    assert np.array_equal(slots, others)
    assert said.bad == other.bad
    assert made is not None
    return made._filled


PLAIN = [
    jpg(1, 24, 24),
    encode(picture(2, 24, 24), "JPEG", quality=30, subsampling=0),
    encode(picture(3, 24, 24), "JPEG", subsampling=1),
    encode(picture(4, 24, 24), "JPEG", exif=b"Exif\x00\x00" + bytes(300), comment=b"\xff\xc0 of a comment"),
    encode(picture(5, 24, 24), "JPEG", restart_marker_blocks=1),
]
OTHERS = [
    encode(picture(6, 24, 24), "JPEG", progressive=True),
    encode(picture(6, 24, 24)[:, :, 0], "JPEG"),
    encode(Image.fromarray(picture(7, 24, 24)).convert("CMYK"), "JPEG"),
    encode(picture(8, 24, 24)),
    jpg(9, 24, 24)[:-150],
    jpg(9, 24, 24)[:150],
    b"\xff\xd8",
    b"no image",
    jpg(10, 24, 24).replace(b"\xff\xda", b"\xff\xdb", 1),
]


@pytest.mark.parametrize("view", [NONE, CENTER, RANDOM])
def test_all_kinds_of_files(view: View, tmp_path: Path) -> None:
    """Files between which the way changes keep their slots, and their names."""
    files = [data for pair in zip(PLAIN, OTHERS, strict=False) for data in pair] + OTHERS[len(PLAIN) :]
    assert check_both_ways(reader_of(tmp_path, files), view) == len(PLAIN)
    assert check_both_ways(reader_of(tmp_path, OTHERS, "others"), view) == 0
    assert check_both_ways(reader_of(tmp_path, PLAIN, "plain"), view) == len(PLAIN)


def test_sizes_other_than_the_views_are_for_the_slower_way(tmp_path: Path) -> None:
    """Whole images of another size, and boxes that are scaled down."""
    sizes = ((24, 24), (24, 23), (23, 24), (48, 48), (20, 90), (1, 1))
    reader = make_reader(tmp_path, (60,), sizes)
    assert check_both_ways(reader, NONE) == 40  # and what is smaller is scaled
    assert check_both_ways(reader, CENTER) == 60 - 10  # the shorter side of 48 is too long
    assert 30 <= check_both_ways(reader, RANDOM) < 60


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, len(PLAIN) - 1),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    cut=st.integers(0, 300),
    view=st.sampled_from([NONE, RANDOM]),
)
def test_damage_is_met_the_same_way(
    tmp_path_factory: pytest.TempPathFactory, which: int, flips: list[tuple[int, int]], cut: int, view: View
) -> None:
    data = bytearray(PLAIN[which])
    for place, mask in flips:
        data[place % len(data)] ^= mask
    reader = reader_of(tmp_path_factory.mktemp("damaged"), [bytes(data[: len(data) - cut]), PLAIN[0]])
    assert check_both_ways(reader, view) >= 1
    reader.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_size_and_subsampling_gives_simplejpegs_pixels(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    files = []
    for seed in range(data.draw(st.integers(1, 6))):
        height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        quality = data.draw(st.sampled_from([20, 75, 100]))
        files.append(encode(noise, "JPEG", quality=quality, subsampling=data.draw(st.integers(0, 2))))
    side = data.draw(st.integers(1, 70))
    kind = data.draw(st.sampled_from(["none", "center", "random-resized"]))
    check_both_ways(reader_of(tmp_path_factory.mktemp("sizes"), files), View(side, kind))


@pytest.mark.parametrize(("place", "value"), [(11, 0x41), (11, 0x12), (14, 0x21), (17, 0x12), (4, 12), (9, 1), (3, 20)])
def test_frame_headers_of_which_versions_of_the_library_may_differ_are_not_plain(
    place: int, value: int, tmp_path: Path
) -> None:
    """Resolutions of the colours that few files have; 12 bit, gray, and what is no such header at all."""
    data = bytearray(jpg(1, 24, 24))
    at = data.index(b"\xff\xc0")
    assert data[at + 11] == 0x22 and data[at + 14] == data[at + 17] == 0x11
    plain = bytes(data)
    data[at + place] = value
    reader = reader_of(tmp_path, [bytes(data), plain])
    found = reader.find(np.arange(2))
    descriptors, held = reader.descriptors(found)
    assert decoder().read(found.columns, descriptors)["height"].tolist() == [0, 24] and held


def test_a_shard_that_is_gone_or_cut_is_named(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, (4, 4, 4), ((24, 24),))
    (tmp_path / "train-000001.tar").unlink()
    cut = tmp_path / "train-000002.tar"
    cut.write_bytes(cut.read_bytes()[:1800])
    slots, filled, _ = filled_by(reader, NONE, True)
    assert [place for place, _ in filled.bad] == list(range(4, 12))
    assert "cannot open shard" in filled.bad[0][1].reason and "was cut after it was indexed" in filled.bad[-1][1].reason
    assert slots[:4].any() and not slots[4:].any()


def test_shards_dropped_meanwhile_stay_open_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of a file that was closed belongs to the next file that is opened."""
    monkeypatch.setattr("distcnn.data.shards.OPEN_FILES", 1)
    reader = make_reader(tmp_path, (3,) * 9, ((24, 24),))
    expected, *_ = filled_by(reader, NONE, False)
    wrong: list[int] = []

    def work(seed: int) -> None:
        filler = Filler(reader, 3, None, reduce=True)
        for _ in range(60):
            ids = np.random.default_rng(seed).permutation(27)
            slots = np.zeros((27, 24, 24, 3), dtype=np.uint8)
            filler.fill(ids, reader.find(ids), slots, 1, NONE)
            if not np.array_equal(slots, expected[ids]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_files_of_other_kinds_are_not_read_twice_for_long(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, [encode(picture(1, 24, 24))] * (ENOUGH // 2))
    made = decoder()
    found = reader.find(np.arange(len(reader)))
    descriptors, held = reader.descriptors(found)
    assert not made.is_idle
    for _ in range(2):
        made.read(found.columns, descriptors)
    assert made.is_idle and held
    half = decoder()
    both = reader_of(tmp_path, [jpg(1, 24, 24), OTHERS[0]] * ENOUGH, "both")
    found = both.find(np.arange(len(both)))
    descriptors, held = both.descriptors(found)
    entries = half.read(found.columns, descriptors)[np.arange(0, 2 * ENOUGH, 2)]
    half.fill(entries, np.tile((0, 0, 24, 24), (ENOUGH, 1)), np.zeros((1, 24, 24, 3), dtype=np.uint8))
    assert not half.is_idle and held


def test_files_that_are_not_in_shards_are_left_to_the_slower_way(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpg(1, 24, 24))
    reader = FileReader([tmp_path / "a.jpg"])
    slots = np.zeros((1, 24, 24, 3), dtype=np.uint8)
    Filler(reader, 1, None, True).fill(np.arange(1), reader.find(np.arange(1)), slots, 0, NONE)
    assert slots.any()


def test_large_files_are_not_read(tmp_path: Path) -> None:
    comment = (b"\xff\xfe\xff\xff" + bytes(65533)) * 17
    data = jpg(1, 24, 24)
    reader = reader_of(tmp_path, [data[:2] + comment + data[2:], data])
    assert len(comment) > MAX_FILE
    found = reader.find(np.arange(2))
    descriptors, held = reader.descriptors(found)
    entries = decoder().read(found.columns, descriptors)
    assert entries["height"].tolist() == [0, 24] and held
    assert check_both_ways(reader, NONE) == 1


def test_no_memory_is_taken_for_images_that_are_not_decoded() -> None:
    made = decoder()
    entries = np.zeros(2, dtype=ENTRY)
    entries["height"], entries["width"] = (24, 9000), (24, 9000)
    done, _ = made.fill(entries, np.array([(0, 0, 9, 9), (0, 0, 25, 9)]), np.zeros((2, 24, 24, 3), dtype=np.uint8))
    assert not done.any() and 24 * 24 * 3 < len(made._pixels) < 24 * 24 * 4


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
    encoded, handle = np.frombuffer(data, dtype=np.uint8).copy(), decoder()
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
    done = command([sys.executable, "-c", CHECKED], tmp_path, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
    assert done.code == 0, done.err
    assert done.out.strip().endswith("checked")


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
    real = turbojpeg.library()
    assert real is not None
    counted = Library(real)
    monkeypatch.setattr(turbojpeg, "library", lambda: counted)
    reader = make_reader(tmp_path, (8,), ((24, 24),))
    filler = Filler(reader, 3, None, reduce=True)
    made = len(counted.made)  # in this thread

    def work(filler: Filler) -> None:
        ids = np.arange(8)
        filler.fill(ids, reader.find(ids), np.zeros((8, 24, 24, 3), dtype=np.uint8), 1, NONE)

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
    real = turbojpeg.library()
    assert real is not None
    poor = Library(real)
    monkeypatch.setattr(poor, "tjInitDecompress", lambda: None)
    turbojpeg.fill_kernel()
    monkeypatch.setattr(turbojpeg, "library", lambda: poor)
    with pytest.raises(MemoryError, match="libturbojpeg"):
        make_decoder()


@pytest.fixture
def searched() -> Any:
    turbojpeg.library.cache_clear()
    yield
    turbojpeg.library.cache_clear()


def test_without_the_library_there_is_none(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "SONAME", "libnothing.so.0")
    assert turbojpeg.library() is None and make_decoder() is None


def test_a_library_that_is_another_is_none(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "SONAME", "libc.so.6")
    assert turbojpeg.library() is None


def test_it_is_found_in_the_environment_of_python(
    searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As conda installs it."""
    real = turbojpeg.library()
    assert real is not None
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123  # not a file on a disk
        path = next(line.split()[-1] for line in maps if "libturbojpeg" in line)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmine.so.0").write_bytes(Path(path).read_bytes())
    monkeypatch.setattr(turbojpeg, "SONAME", "libmine.so.0")
    monkeypatch.setattr(turbojpeg.sys, "prefix", str(tmp_path))
    turbojpeg.library.cache_clear()
    found = turbojpeg.library()
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
