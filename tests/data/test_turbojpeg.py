"""Reading and decoding without the interpreter: the same slots and the same complaints as the slower way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import encode, jpg, picture, write_tar
from split_files import make_reader

from distcnn.data import fill
from distcnn.data.fill import Filled, Filler
from distcnn.data.manifest import Shard, Split
from distcnn.data.readers import FileReader
from distcnn.data.shards import SplitReader, make_index, samples_in
from distcnn.data.turbojpeg import ENOUGH, ENTRY, MAX_FILE, Decoder, make_decoder
from distcnn.data.views import View
from tests.support import in_threads

pytestmark = pytest.mark.usefixtures("libturbojpeg")

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

    in_threads(work, 4)
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
