"""What there is to prepare: names, labels and a way to the bytes of each image, however many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.manifest import UNLABELLED
from distcnn.errors import DataError

Ids = NDArray[np.int64]
Report = Callable[[str, int, int], None]  # (stage, images done, images in all), called every few hundred images
SPLITS = ("train", "val", "test")
FREE = -1  # in `split_of`: the source does not say which split


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes within a file."""

    path: str
    offset: int
    size: int


# An encoded image as a path (relative to Source.root), as bytes or as a part of a file; or pixels, (H, W) or
# (H, W, 3) uint8.
Payload = str | bytes | Slice | NDArray[np.uint8]


def _nothing(folder: Path) -> None:
    """Most sources need no folder to unpack into."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """N images in a fixed order. What is in memory is a few words an image, never the images of a folder.

    `labels` (N,) int64, -1 = none; `sizes` (N,) int64 bytes that a payload takes in memory; `split_of` (N,) int64 the
    place in SPLITS that the source gives an image, FREE where it leaves that open; `groups` (N,) int64 or None: images
    of one group stay in one split. `digest` (hex) changes where names, labels, sizes or times of change do.
    `where(i)` says where the source speaks of an image, for messages. `unpack(folder)` is called once before the first
    `payload(i)`, with a folder for files that live as long as the work.
    """

    kind: str
    name: str
    classes: tuple[str, ...]
    names: list[str]
    labels: Ids
    payload: Callable[[int], Payload]
    sizes: Ids
    digest: str
    split_of: Ids
    groups: Ids | None = None
    root: str = ""
    named: bool = True  # the names mean something to the user, and go into the shards
    facts: dict[str, Any] = field(default_factory=dict)  # for the manifest
    warnings: tuple[str, ...] = ()
    where: Callable[[int], str] | None = None
    unpack: Callable[[Path], None] = _nothing

    def __post_init__(self) -> None:
        n = len(self.names)
        columns = {"labels": self.labels, "sizes": self.sizes, "split_of": self.split_of}
        if self.groups is not None:
            columns["groups"] = self.groups
        for what, column in columns.items():
            if column.shape != (n,):
                raise ValueError(f"{what} has shape {column.shape} for {n} names")
        if n and not UNLABELLED <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(f"labels must lie in -1..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.names)

    def tell(self, i: int) -> str:
        """Where the source speaks of image i."""
        return self.names[i] if self.where is None else self.where(i)


def order_classes(names: set[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: by value if all are integers ('2' before '10'), else as text."""
    if all(name.isdecimal() and name.isascii() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def number_labels(texts: list[str], classes: tuple[str, ...] | None, where: str) -> tuple[Ids, tuple[str, ...]]:
    """(labels (n,), class names) of labels as text, '' = none.

    With `classes`, a text is one of them or a number 0..K-1; without, they are the texts that occur. Raises DataError,
    which begins with `where`, for another text, and for fewer than 2 classes.
    """
    present = set(texts) - {""}
    if classes is None:
        classes = order_classes(present)
        label_of: dict[str, int] = {}
    else:
        label_of = {str(label): label for label in range(len(classes))}
    label_of |= {text: label for label, text in enumerate(classes)}
    strange = sorted(present - set(label_of))
    if strange:
        raise DataError(f"{where}: label {strange[0]!r} is none of the {len(classes)} classes")
    if len(classes) < 2:
        raise DataError(f"{where}: 1 class ({', '.join(classes)}); a classifier needs at least 2")
    label_of[""] = UNLABELLED
    return np.array([label_of[text] for text in texts], dtype=np.int64), classes


def printable(name: str) -> str:
    """`name` with what is no valid Unicode (file names of other encodings) as '?'."""
    return name if name.isascii() else name.encode("utf-8", "replace").decode()


def digest_of(*parts: list[str] | NDArray[Any]) -> str:
    """sha256 (hex) over lists of text and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, list):
            digest.update("\n".join(part).encode("utf-8", "surrogateescape"))
        else:
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        digest.update(b"\0\0")
    return digest.hexdigest()
