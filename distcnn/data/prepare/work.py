"""What a worker process does with some samples: read, check, pack. A pure function of its task."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field

from PIL import Image

from distcnn.data.decode import DecodeError, Pixels
from distcnn.data.manifest import UNLABELLED
from distcnn.data.prepare.images import Policy, check, load
from distcnn.data.prepare.packing import Packer
from distcnn.data.prepare.source import Payload
from distcnn.data.prepare.stats import Sums
from distcnn.data.shards import IndexRows, make_index

HOLD_BYTES = 32 << 20  # decoded pixels kept until they are counted together


@dataclass(frozen=True, slots=True)
class Item:
    """A sample to be: `name` goes into <key>.json unless it is ''."""

    key: str
    name: str
    label: int
    payload: Payload


@dataclass(frozen=True)
class Part:
    """Consecutive samples packed: the bytes of their members, index rows with offsets from 0, what was left out.

    `ends` are the offsets at which the samples end; `hashes` of the encoded images (16 bytes each).
    """

    tar: bytes
    rows: IndexRows
    ends: list[int]
    hashes: list[bytes]
    bad: list[tuple[int, str]]  # (place in the task, reason)
    sums: Sums = field(default_factory=Sums)


def pack(items: list[Item], policy: Policy, count_pixels: bool) -> Part:
    """Read, check and pack some samples. Images that cannot be used are in `bad`; nothing is raised for them."""
    warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters raises
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    packer, sums = Packer(), Sums()
    rows: list[tuple[int, int, int, int, int, str]] = []
    ends: list[int] = []
    hashes: list[bytes] = []
    bad: list[tuple[int, str]] = []
    held: list[Pixels] = []
    held_bytes = 0
    for place, item in enumerate(items):
        try:
            image = check(load(item.payload), policy)
        except DecodeError as error:
            bad.append((place, str(error)))
            continue
        height, width = image.pixels.shape[:2]
        offset = packer.add(item.key, members_of(item, image.data, image.extension), image.extension)
        rows.append((offset, len(image.data), item.label, width, height, item.key))
        ends.append(packer.size)
        hashes.append(hashlib.blake2b(image.data, digest_size=16).digest())
        if count_pixels:
            held.append(image.pixels)
            held_bytes += image.pixels.nbytes
            if held_bytes > HOLD_BYTES:
                sums.add(held)
                held, held_bytes = [], 0
    sums.add(held)
    return Part(packer.take(), make_index(rows), ends, hashes, bad, sums)


def members_of(item: Item, data: bytes, extension: str) -> dict[str, bytes]:
    """The members of a sample by extension: the image, .cls if it has a label, .json if it has a name."""
    members = {extension: data}
    if item.label != UNLABELLED:
        members["cls"] = b"%d" % item.label
    if item.name:
        members["json"] = json.dumps({"name": item.name}, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return members
