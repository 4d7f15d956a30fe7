"""Reading and decoding many JPEG files in calls that need no interpreter, where libturbojpeg is installed.

simplejpeg holds a copy of the same library that can only be called from Python, image by image; between two images
threads wait for the interpreter's lock, and each makes a decoder anew. Here Numba's code calls the library itself. What
it does not take, or complains of, is left to `distcnn.data.decode`; so is everything where the library or Numba is
missing, or its pixels are not simplejpeg's, which is looked at when it is first asked for.

TurboJPEG's API: https://libjpeg-turbo.org/Documentation/Documentation (tjInitDecompress, tjDecompress2, tjDestroy).
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from distcnn import compiled
from distcnn.compiled import Kernel
from distcnn.data import keyed
from distcnn.data.decode import MAX_PIXELS, Pixels, memory
from distcnn.data.resize import SPILL, resize_into
from distcnn.data.shards import COLUMNS, IndexRows

SONAME = "libturbojpeg.so.0"
READ = ("file", "offset", "size", "at", "height", "width")
BOX = ("top", "left", "high", "wide")
ENTRY = np.dtype([(name, "<i8") for name in (*READ, "slot", *BOX)])  # as the kernels number them
MAX_FILE = 1 << 20  # bytes: where files are larger the interpreter does not count, and memory does
ENOUGH = 256  # files to judge by
SIDE = 48  # of what the check fills


@cache
def libturbojpeg() -> ctypes.CDLL | None:
    """The shared object, of the system or of the environment that Python runs in; None if there is none."""
    for name in (SONAME, str(Path(sys.prefix) / "lib" / SONAME)):
        try:
            found = ctypes.CDLL(name)
            found.tjInitDecompress.restype = ctypes.c_void_p
            found.tjDestroy.argtypes = [ctypes.c_void_p]
            found.tjDecompress2  # noqa: B018  # whether it is there
        except (OSError, AttributeError):
            continue
        return found
    return None


class Decoder:
    """Reads JPEG files, decodes those that are plain, and scales boxes of them up. Not for several threads."""

    def __init__(self, read_files: Kernel, fill_slots: Kernel) -> None:
        self._read_files, self._fill_slots = read_files, fill_slots
        self._read = self._filled = 0  # files
        self._encoded, self._pixels = memory(0), memory(0)
        self._library = libturbojpeg()
        assert self._library is not None
        self._handle = self._library.tjInitDecompress()
        if not self._handle:
            raise MemoryError("libturbojpeg has no memory for a decoder")

    def __del__(self) -> None:
        if self._library is not None and getattr(self, "_handle", None):
            self._library.tjDestroy(self._handle)

    @property
    def is_idle(self) -> bool:
        """Whether most files were of another kind, so that reading more of them would be in vain."""
        return self._read >= ENOUGH and 2 * self._filled < self._read

    def read(self, columns: IndexRows, descriptors: NDArray[np.int64]) -> NDArray[np.void]:
        """(n,) of ENTRY: the samples at `offset`, of `size` bytes in `columns` (n,), of open files.

        Their height and width in pixels are 0 for what is no plain baseline JPEG file, or cannot be read, or is large.
        What was read is kept until the next call.
        """
        entries = np.zeros(len(columns), dtype=ENTRY)
        sizes = columns["size"]
        sizes = np.where((sizes > 0) & (sizes <= MAX_FILE), sizes, 0)
        entries["file"], entries["offset"], entries["size"] = descriptors, columns["offset"], sizes
        ends = np.cumsum(sizes)
        entries["at"] = ends - sizes
        self._encoded = _at_least(self._encoded, int(ends[-1]) if len(ends) else 0)
        self._read_files(_as_rows(entries), self._encoded)
        self._read += len(entries)
        entries["height"][entries["height"] * entries["width"] > MAX_PIXELS] = 0
        return entries

    def fill(
        self, entries: NDArray[np.void], boxes: NDArray[np.int64], slots: Pixels
    ) -> tuple[NDArray[np.bool_], float]:
        """Decode what `read` returned, (m,) of them, and scale boxes (m, 4) up into `slot` of `slots` (n, S, S, 3).

        The bits are those of `decode` and `resize_into`. Returned is (m,) bool, which could be had without a complaint
        of the library and are not larger than a slot, and how many seconds scaling took.
        """
        for column, name in enumerate(BOX):
            entries[name] = boxes[:, column]
        done = np.zeros(len(entries), dtype=np.bool_)
        fits = boxes[:, 2:].max(axis=1, initial=0) <= slots.shape[1]
        largest = int((entries["height"] * entries["width"]).max(initial=0, where=fits))
        self._pixels = _at_least(self._pixels, largest * 3 + SPILL)
        rows = _as_rows(entries)
        nanoseconds = self._fill_slots(self._handle, rows, self._encoded, self._pixels, slots, done)
        self._filled += int(np.count_nonzero(done))
        return done, nanoseconds * 1e-9


def _at_least(pixels: Pixels, values: int) -> Pixels:
    return pixels if len(pixels) >= values else memory(values + values // 4)


def _as_rows(entries: NDArray[np.void]) -> NDArray[np.int64]:
    return entries.view(np.int64).reshape(len(entries), ENTRY.itemsize // 8)


def make_decoder() -> Decoder | None:
    """One for a thread; None where they cannot be had."""
    if libturbojpeg() is None:
        return None
    read_files, fill_slots = read_kernel(), fill_kernel()
    return Decoder(read_files, fill_slots) if read_files and fill_slots else None


def _choose(kernels: ModuleType) -> tuple[Any, str]:
    import llvmlite.binding as llvm

    found = libturbojpeg()
    assert found is not None
    address = ctypes.cast(found.tjDecompress2, ctypes.c_void_p).value
    llvm.add_symbol("tjDecompress2", address)
    return kernels.fill_slots, kernels.FILL_SLOTS


def _is_exact(fill_slots: Kernel) -> bool:
    """Whether pixels of all kinds of files that are taken are simplejpeg's, whole and scaled, and none is refused."""
    read_files = read_kernel()
    if read_files is None:
        return False
    files = list(_probes())
    images = [simplejpeg.decode_jpeg(data, "RGB") for data in files]
    columns = np.zeros(len(files), dtype=COLUMNS)
    columns["size"] = [len(data) for data in files]
    columns["offset"] = np.cumsum(columns["size"]) - columns["size"]
    decoder = Decoder(read_files, fill_slots)
    file = os.memfd_create("distcnn")
    try:
        os.write(file, b"".join(files))
        entries = decoder.read(columns, np.full(len(files), file))
    finally:
        os.close(file)
    entries["slot"] = np.arange(len(files))
    found, expected = np.zeros((2, len(files), SIDE, SIDE, 3), dtype=np.uint8)
    boxes = [
        (h // 3 % 2, w // 3 % 2, min(h - h // 3 % 2, SIDE), min(w - w // 3 % 2, SIDE))
        for h, w, _ in (image.shape for image in images)
    ]
    for slot, image, box in zip(expected, images, boxes, strict=True):
        resize_into(slot, image, box)
    done, _ = decoder.fill(entries, np.array(boxes), found)
    return bool(done.all()) and np.array_equal(found, expected)


def _probes() -> Iterator[bytes]:
    """Noise and soft colours, at sizes that end within a block."""
    noise = keyed.words(np.arange(57 * 83 * 3), 0, 0, 0).astype(np.uint8).reshape(57, 83, 3)
    smooth = np.asarray(Image.fromarray(noise[:9, :9]).resize((83, 57), Image.Resampling.BICUBIC))
    for height, width in ((57, 83), (SIDE, SIDE), (1, 1), (16, 16), (17, 31), (33, 8), (5, 2)):
        for subsampling in (0, 1, 2):
            for quality, pixels in ((95, noise), (60, smooth)):
                out = io.BytesIO()
                Image.fromarray(pixels[:height, :width]).save(out, "JPEG", quality=quality, subsampling=subsampling)
                yield out.getvalue()


read_kernel = compiled.kernel(lambda kernels: (kernels.read_files, kernels.READ_FILES), lambda kernel: True)
fill_kernel = compiled.kernel(_choose, _is_exact)
