"""IDX files, the form of MNIST and its kin; known sets are told apart by checksum, since their names are the same.

Format: "THE IDX FILE FORMAT" at the end of LeCun, Cortes and Burges' page on MNIST.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcnn.data.prepare.arrays import source_of_arrays
from distcnn.data.prepare.source import Source
from distcnn.errors import DataError

UNSIGNED_BYTE = 8
MAX_BYTES = 4 << 30
GZIP = b"\x1f\x8b"
DIGITS = tuple("0123456789")

# md5 of the files as they are unpacked -> (set, what it holds). Fashion-MNIST's files bear MNIST's names.
KNOWN = {
    "6bbc9ace898e44ae57da46a324031adb": ("MNIST", "train images"),
    "a25bea736e30d166cdddb491f175f624": ("MNIST", "train labels"),
    "2646ac647ad5339dbf082846283269ea": ("MNIST", "test images"),
    "27ae3e4e09519cfbb04c329615203637": ("MNIST", "test labels"),
    "f4a8712d7a061bf5bd6d2ca38dc4d50a": ("Fashion-MNIST", "train images"),
    "9018921c3c673c538a1fc5bad174d6f9": ("Fashion-MNIST", "train labels"),
    "8181f5470baa50b63fa0f6fddb340f0a": ("Fashion-MNIST", "test images"),
    "15d484375f8d13e6eb1aabb0c3f46965": ("Fashion-MNIST", "test labels"),
}
CLASSES = {
    "MNIST": DIGITS,
    "Fashion-MNIST": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}


def from_idx(images: Path, labels: Path, test_images: Path | None = None, test_labels: Path | None = None) -> Source:
    """Images and labels of IDX files (.gz or unpacked); those of `test_*` become the split test.

    The set's name and classes are known for MNIST and Fashion-MNIST; any other is named after its folder. Raises
    DataError for damaged files, and for files of two known sets, or of a wrong part, put together.
    """
    if test_labels is not None and test_images is None:
        raise DataError("--test-labels without --test-images: give both")
    read = [read_idx(images, 3), read_idx(labels, 1)]
    files = [images, labels]
    for file, ndim in ((test_images, 3), (test_labels, 1)):
        if file is not None:
            read.append(read_idx(file, ndim))
            files.append(file)
    known = [(file, *KNOWN[md5]) for file, (_, md5) in zip(files, read, strict=True) if md5 in KNOWN]
    for file, name, part in known:
        if name != known[0][1]:
            raise DataError(
                f"{file} is of {name} ({part}), but {known[0][0]} is of {known[0][1]}: take all from one set"
            )
    wanted = {images: "train images", labels: "train labels", test_images: "test images", test_labels: "test labels"}
    strange = [row for row in known if wanted[row[0]] != row[2]]
    if strange and test_images is not None:
        file, name, part = strange[0]
        raise DataError(f"{file} holds {name}'s {part}, but was given as {wanted[file]}")
    if strange and len({row[2].split()[0] for row in known}) > 1:
        raise DataError(f"{images} and {labels} are of different parts of {known[0][1]}: take both of train or of test")
    parts: list[tuple[str, NDArray[np.uint8], NDArray[np.uint8] | None]] = [
        ("train" if test_images is not None else "", read[0][0], read[1][0])
    ]
    if test_images is not None:
        parts.append(("test", read[2][0], read[3][0] if test_labels is not None else None))
    name = known[0][1] if known else images.resolve().parent.name
    source = source_of_arrays("idx", name, parts, CLASSES.get(name) if known else None, str(images))
    source.facts["known_set"] = known[0][1] if known else "no"
    return source


def read_idx(file: Path, ndim: int) -> tuple[NDArray[np.uint8], str]:
    """(array of `ndim` dimensions, md5 of the unpacked file). Raises DataError naming the file."""
    try:
        data = file.read_bytes()
        if data[:2] == GZIP:
            data = _gunzip(data, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(f"{file} is not an IDX file: it does not begin with two zero bytes")
    if data[2] != UNSIGNED_BYTE or data[3] != ndim:
        raise DataError(
            f"{file} holds {data[3]} dimensions of type 0x{data[2]:02x}; {ndim} of unsigned bytes (0x08) are wanted"
            f" here ({'images' if ndim == 3 else 'labels'}): are the files in the right order?"
        )
    shape = struct.unpack_from(f">{ndim}I", data, 4) if len(data) >= 4 + 4 * ndim else (0,)
    if 0 in shape or len(data) != 4 + 4 * ndim + int(np.prod(shape, dtype=np.float64)):
        raise DataError(
            f"{file} should hold {' x '.join(map(str, shape))} bytes but has {len(data)} in all: it is damaged"
        )
    array = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * ndim).reshape(shape)
    return array, hashlib.md5(data, usedforsecurity=False).hexdigest()


def _gunzip(data: bytes, file: Path) -> bytes:
    """The unpacked bytes, at most MAX_BYTES."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
        out = packed.read(MAX_BYTES + 1)
    if len(out) > MAX_BYTES:
        raise DataError(f"{file} unpacks to more than {MAX_BYTES} bytes: refused")
    return out
