"""Images decoded into memory of a thread and scaled in groups: which memory, whose slots, what the index says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import encode, jpg, picture
from split_files import make_reader

from distcnn.data import resize
from distcnn.data.decode import ALIGNED, OFF, decode, decode_reduced, jpeg_shape, memory, offset, plain_header
from distcnn.data.fill import Filled, Filler
from distcnn.data.resize import GROUP_BYTES, Group, resize_into
from distcnn.data.shards import Found, SplitReader
from distcnn.data.shared import Mappings, SharedMemory
from distcnn.data.upload import CPU, Upload
from distcnn.data.views import View


def address(pixels: np.ndarray) -> int:
    return int(pixels.ctypes.data) % ALIGNED


@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 31, 32, 4096, 4111])
def test_images_begin_off_the_multiples(start: int) -> None:
    assert (start + offset(start)) % ALIGNED == OFF and 0 <= offset(start) < ALIGNED


@pytest.mark.parametrize("shared", [False, True])
def test_so_does_all_that_is_decoded_into(shared: bool) -> None:
    assert [address(memory(values)) for values in (1, 3072, 10**6)] == [OFF] * 3
    buffer = Upload(CPU, 1, shared).buffer(5, 32)
    assert address(buffer.pixels) == OFF and buffer.images.is_contiguous()
    assert buffer.images.shape == (5, 32, 32, 3)


def test_a_mapping_is_off_by_as_much_and_is_the_same_memory() -> None:
    here = SharedMemory(96)
    there = Mappings().pixels(here.address)
    here.pixels[:] = np.arange(96)
    assert address(here.pixels) == address(there) == OFF
    assert len(there) == 96 and np.array_equal(here.pixels, there)


def scaled(data: bytes, box: tuple[int, ...], side: int) -> np.ndarray:
    out = np.empty((side, side, 3), dtype=np.uint8)
    resize_into(out, decode(data), box)
    return out


def fill_group(group: Group, sizes: list[tuple[int, int]], side: int) -> tuple[np.ndarray, np.ndarray]:
    """What a group makes of images of these sizes, every other one copied, and what it should make."""
    slots = np.zeros((len(sizes), side, side, 3), dtype=np.uint8)
    expected = np.zeros_like(slots)
    for number, (height, width) in enumerate(sizes):
        data, slot = jpg(number, height, width), len(sizes) - 1 - number
        box = (height // 3, width // 4, height - height // 3, width - width // 4)
        if number % 2:
            group.copy(slot, decode(data), box)
        else:
            pixels = group.decode(slot, data, (height, width), 1, box)
            assert address(pixels) == OFF and np.array_equal(pixels, decode(data))
        expected[slot] = scaled(data, box, side)
    group.scale_into(slots)
    return slots, expected


@pytest.mark.parametrize("kernel", [True, False])
def test_each_box_goes_to_its_slot(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger and smaller than the slot, and of just its size; twice, so that memory is used again."""
    if not kernel:
        monkeypatch.setattr(resize, "upscale_kernel", lambda: None)
    group = Group()
    for sizes in ([(20, 30), (40, 8), (24, 16), (90, 70), (1, 1)], [(200, 200), (12, 12)], [(5, 9)] * 9):
        slots, expected = fill_group(group, sizes, 16)
        assert np.array_equal(slots, expected)


def test_a_group_is_full_by_its_bytes() -> None:
    group, data = Group(), jpg(1, 128, 128)
    counted = 0
    while not group.full:
        group.decode(counted, data, (128, 128), 1, (0, 0, 9, 9))
        counted += 1
    assert counted == GROUP_BYTES // (128 * 128 * 3) == 8
    group.forget()
    assert not group.full


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_what_is_no_jpeg_is_laid_there_too(factor: int) -> None:
    pixels = picture(3, 21, 18)
    shape = -(-21 // factor), -(-18 // factor), 3
    place = np.empty(np.prod(shape), dtype=np.uint8)
    out = decode_reduced(encode(pixels), (21, 18), factor, place)
    assert np.shares_memory(out, place) and np.array_equal(out, pixels[::factor, ::factor])


class Reader(SplitReader):
    """Gives other bytes than the index was made of."""

    files: dict[int, bytes]

    def read(self, ids: np.ndarray, found: object = None) -> list[bytes]:
        return [self.files[int(sample)] for sample in ids]

    def descriptors(self, found: Found) -> tuple[np.ndarray, list[object]]:
        return np.full(len(found.shards), -1), []


def cmyk(height: int, width: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(5, height, width)).convert("CMYK").save(out, "JPEG")
    return out.getvalue()


def filled_with(root: Path, files: list[bytes], side: int, reduce: bool) -> tuple[np.ndarray, Filled]:
    made = make_reader(root, (len(files),), ((40, 48),))
    reader = Reader(made.root, made.split)
    reader.files = dict(enumerate(files))
    ids = np.arange(len(files))
    slots = np.full((len(files), side, side, 3), 7, dtype=np.uint8)
    filler = Filler(reader, 1, None, reduce)
    return slots, filler.fill(ids, reader.find(ids), slots, 0, View(side, "center"))


@pytest.mark.parametrize(("side", "reduce"), [(30, True), (30, False), (8, True)])
def test_sizes_of_the_index_are_believed_whatever_the_format(side: int, reduce: bool, tmp_path: Path) -> None:
    files = [jpg(1, 40, 48), encode(picture(2, 40, 48)), cmyk(40, 48)]
    slots, filled = filled_with(tmp_path, files, side, reduce)
    box = tuple(int(value) for value in View(side, "center").boxes(np.zeros(1, int), *np.array([[40], [48]]), 0, 0)[0])
    assert not filled.bad
    for slot, data in zip(slots, files, strict=True):
        if side == 30 or data is not files[0]:  # that one is reduced
            assert np.array_equal(slot, scaled(data, box, side))


def test_a_file_of_another_size_than_the_index_says_is_what_it_is(tmp_path: Path) -> None:
    files = [jpg(1, 40, 48), jpg(2, 40, 47), jpg(3, 41, 48)]
    slots, filled = filled_with(tmp_path, files, 30, True)
    assert not filled.bad
    for slot, data, (height, width) in zip(slots, files, ((40, 48), (40, 47), (41, 48)), strict=True):
        box = View(30, "center").boxes(np.zeros(1, int), np.array([height]), np.array([width]), 0, 0)[0].tolist()
        assert np.array_equal(slot, scaled(data, tuple(box), 30))


def test_a_file_with_two_headers_is_reported(tmp_path: Path) -> None:
    """A comment that looks like the header of an image of the index's size, in a file of another."""
    data, header = jpg(2, 40, 47), plain_header(40, 48)
    comment = b"\xff\xfe" + (len(header) + 2).to_bytes(2) + header
    slots, filled = filled_with(tmp_path, [jpg(1, 40, 48), data[:2] + comment + data[2:]], 30, True)
    assert [place for place, _ in filled.bad] == [1] and not slots[1].any()
    assert filled.bad[0][1].reason == "its header says 48x40 pixels, but there are others"


@pytest.mark.parametrize("said", [(60_000, 60_000), (40, 0), (-40, -48), (40 + (1 << 16), 48)])
def test_a_size_that_cannot_be_is_not_believed(said: tuple[int, int]) -> None:
    """Such an index would otherwise make the loader ask for so much memory."""
    data, header = jpg(2, 40, 48), plain_header(*said)
    comment = b"\xff\xfe" + (len(header) + 2).to_bytes(2) + header
    assert jpeg_shape(data[:2] + comment + data[2:], said) == (40, 48)


def test_sizes_that_the_index_does_not_have_are_looked_up(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, (9,), ((12, 12), (20, 9), (31, 33)))
    ids, view = np.arange(9), View(14, "random-resized")
    found = reader.find(ids)
    assert found.columns["width"].tolist() == [12, 9, 33] * 3
    with_sizes, without = np.zeros((2, 9, 14, 14, 3), dtype=np.uint8)
    filler = Filler(reader, 1, None, True)
    filler.fill(ids, found, with_sizes, 3, view)
    found.columns["width"] = found.columns["height"] = 0
    filler.fill(ids, found, without, 3, view)
    assert np.array_equal(with_sizes, without) and without.any()


def test_tiles_are_the_same_without_numba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_reader(tmp_path, (30,), ((12, 12), (20, 9), (31, 33)))
    ids = np.arange(30)
    made = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(resize, "upscale_kernel", lambda: None)
        slots = np.zeros((30, 24, 24, 3), dtype=np.uint8)
        Filler(reader, 1, None, True).fill(ids, reader.find(ids), slots, 3, View(24, "random-resized"))
        made.append(torch.from_numpy(slots))
    assert torch.equal(*made) and made[0].any()
