"""What a worker process does with some samples: read, check, pack. A pure function of its task."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distcnn.data.decode import DecodeError
from distcnn.data.manifest import UNLABELLED
from distcnn.data.prepare.handover import Left, leave
from distcnn.data.prepare.images import Checked, Checker, Policy, load
from distcnn.data.prepare.packing import tar_of
from distcnn.data.prepare.source import Payload
from distcnn.data.prepare.stats import Sums
from distcnn.data.shards import IndexRows, index_dtype, make_index
from distcnn.data.tar import BLOCK

HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Task:
    """Consecutive samples to be, in columns. A name that is '' gets no <key>.json."""

    keys: list[str]
    names: list[str]
    labels: list[int]
    payloads: list[Payload]
    root: str


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive samples packed: the bytes of their members, index rows with offsets from 0, and what was left out.

    `ends`: the offsets at which the samples end. `hashes`: 16 bytes of each encoded image, if asked for. `good` and
    `bad`: places in the task; `reasons` why.
    """

    tar: NDArray[np.uint8] | Left
    rows: IndexRows
    ends: NDArray[np.int64]
    hashes: bytes
    good: list[int]
    bad: list[int]
    reasons: list[str]
    sums: Sums


def pack(task: Task, policy: Policy, count_pixels: bool, hash_images: bool = False, slot: str = "") -> Part:
    """Read, check and pack some samples. An image that cannot be used is named in `bad`; nothing is raised for it.

    The bytes are left in `slot`, if there is one (handover.py).
    """
    check, members, sums = Checker(policy), Members(), Sums()
    good: list[int] = []
    bad: list[int] = []
    reasons: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters raises
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for place, (payload, key, name, label) in enumerate(
            zip(task.payloads, task.keys, task.names, task.labels, strict=True)
        ):
            image = _checked(check, payload, task.root)
            if isinstance(image, str):
                bad.append(place)
                reasons.append(image)
                continue
            members.add(key, image, name, label)
            good.append(place)
            if count_pixels:
                sums.add(image.pixels)
    sums.settle()
    hashes = b"".join(map(content_hash, members.images())) if hash_images else b""
    tar, rows, ends = members.packed()
    return Part(leave(tar, slot), rows, ends, hashes, good, bad, reasons, sums)


class Members:
    """The members of samples, one sample after another: .cls if it has a label, the image, .json if it has a name."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._contents: list[bytes] = []
        self._images: list[int] = []  # of each sample, the place of its image among the members
        self._ends: list[int] = []  # and of the next sample's first member
        self._facts: list[tuple[int, int, int]] = []  # label, width, height
        self._keys: list[str] = []

    def add(self, key: str, image: Checked, name: str, label: int) -> None:
        """Members come in the order of their extensions, as webdataset's writer has them."""
        if label != UNLABELLED:
            self._put(key + ".cls", b"%d" % label)
        told = f'{{"name": {encode_basestring(name)}}}'.encode("utf-8", "replace") if name else b""
        if told and image.extension > "json":
            self._put(key + ".json", told)
        self._images.append(len(self._names))
        self._put(f"{key}.{image.extension}", image.data)
        if told and image.extension < "json":
            self._put(key + ".json", told)
        self._ends.append(len(self._names))
        height, width = image.pixels.shape[:2]
        self._facts.append((label, width, height))
        self._keys.append(key)

    def _put(self, name: str, content: bytes) -> None:
        self._names.append(name)
        self._contents.append(content)

    def images(self) -> Iterator[bytes]:
        """The encoded image of each sample."""
        return map(self._contents.__getitem__, self._images)

    def packed(self) -> tuple[NDArray[np.uint8], IndexRows, NDArray[np.int64]]:
        """(bytes of the members, index rows, (n,) offsets at which the samples end)."""
        tar, offsets = tar_of(self._names, self._contents)
        if not self._keys:
            return tar, make_index([]), offsets
        keys = np.array(self._keys, dtype=np.bytes_)
        rows = np.empty(len(keys), dtype=index_dtype(keys.dtype.itemsize))
        rows["key"], rows["offset"] = keys, offsets[self._images]
        rows["size"] = [len(image) for image in self.images()]
        rows["label"], rows["width"], rows["height"] = np.array(self._facts, dtype=np.int32).T
        ends = np.append(offsets - BLOCK, len(tar))[self._ends]
        return tar, rows, ends


def hash_payloads(payloads: list[Payload], root: str) -> list[bytes]:
    """16 bytes of each payload's content; b'' of what cannot be read."""
    out = []
    for payload in payloads:
        try:
            content = load(payload, root)
        except DecodeError:
            out.append(b"")
            continue
        out.append(content_hash(content if isinstance(content, bytes) else content.tobytes()))
    return out


def content_hash(data: bytes) -> bytes:
    """The first 16 bytes of sha256."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def _checked(check: Checker, payload: Payload, root: str) -> Checked | str:
    """The image, or why it cannot be used."""
    try:
        return check(load(payload, root))
    except DecodeError as error:
        return str(error)
    except MemoryError:
        raise  # says nothing about the image
    except Exception as error:  # a decoder's own failure on a malformed file: it would fail in training too
        return f"the decoder failed: {type(error).__name__}: {error}"
