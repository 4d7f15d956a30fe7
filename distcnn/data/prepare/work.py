"""What a worker process does with some samples: read, check, pack. A pure function of its task."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from json.encoder import encode_basestring

from PIL import Image

from distcnn.data.decode import DecodeError
from distcnn.data.manifest import UNLABELLED
from distcnn.data.prepare.images import Checked, Policy, check, load
from distcnn.data.prepare.packing import Packer
from distcnn.data.prepare.source import Payload
from distcnn.data.prepare.stats import Sums
from distcnn.data.shards import IndexRows, make_index

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

    tar: bytes
    rows: IndexRows
    ends: list[int]
    hashes: bytes
    good: list[int]
    bad: list[int]
    reasons: list[str]
    sums: Sums


def pack(task: Task, policy: Policy, count_pixels: bool, hash_images: bool = False) -> Part:
    """Read, check and pack some samples. An image that cannot be used is named in `bad`; nothing is raised for it."""
    packer, sums = Packer(), Sums()
    rows: list[tuple[int, int, int, int, int, str]] = []
    ends: list[int] = []
    hashes: list[bytes] = []
    good: list[int] = []
    bad: list[int] = []
    reasons: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters raises
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for place, (key, name, label) in enumerate(zip(task.keys, task.names, task.labels, strict=True)):
            image = _checked(task.payloads[place], task.root, policy)
            if isinstance(image, str):
                bad.append(place)
                reasons.append(image)
                continue
            data = image.data
            offset = packer.add(key, members_of(image, name, label), image.extension)
            height, width = image.pixels.shape[:2]
            rows.append((offset, len(data), label, width, height, key))
            ends.append(packer.size)
            if hash_images:
                hashes.append(content_hash(data))
            good.append(place)
            if count_pixels:
                sums.add(image.pixels)
    sums.settle()
    return Part(packer.take(), make_index(rows), ends, b"".join(hashes), good, bad, reasons, sums)


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


def members_of(image: Checked, name: str, label: int) -> dict[str, bytes]:
    """The members of a sample by extension: the image, .cls if it has a label, .json if it has a name."""
    members = {image.extension: image.data}
    if label != UNLABELLED:
        members["cls"] = b"%d" % label
    if name:
        members["json"] = f'{{"name": {encode_basestring(name)}}}'.encode("utf-8", "replace")
    return members


def _checked(payload: Payload, root: str, policy: Policy) -> Checked | str:
    """The image, or why it cannot be used."""
    try:
        return check(load(payload, root), policy)
    except DecodeError as error:
        return str(error)
    except MemoryError:
        raise  # says nothing about the image
    except Exception as error:  # a decoder's own failure on a malformed file: it would fail in training too
        return f"the decoder failed: {type(error).__name__}: {error}"
