"""What there is to prepare: names, labels and a way to the bytes of each image, however many there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.manifest import UNLABELLED

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Slice:
    """Bytes within a file."""

    path: str
    offset: int
    size: int


# An encoded image as a path, as bytes or as a part of a file; or pixels, (H, W) or (H, W, 3) uint8.
Payload = str | bytes | Slice | NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """N images in a fixed order. What is in memory is a few words an image, never the images of a folder.

    `split_of` (N,) int: the place in `split_names` of the split that each image was given, -1 = still to be split.
    `groups` (N,) int or None: images of one group stay in one split. `sizes` (N,) bytes that each takes in memory,
    before decoding. `digest` (hex) changes if names, labels, sizes or times of change do.
    """

    kind: str
    name: str
    classes: tuple[str, ...]
    names: list[str]
    labels: Labels
    payload: Callable[[int], Payload]
    sizes: NDArray[np.int64]
    digest: str
    split_names: tuple[str, ...] = ()
    split_of: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    groups: NDArray[np.int64] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    named: bool = True  # the names mean something to the user, and go into the shards
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.names)
        if self.split_of.size == 0:
            object.__setattr__(self, "split_of", np.full(n, -1, dtype=np.int64))
        for what, column in (("labels", self.labels), ("sizes", self.sizes), ("split_of", self.split_of)):
            if column.shape != (n,):
                raise ValueError(f"{what} has shape {column.shape} for {n} names")
        if self.groups is not None and self.groups.shape != (n,):
            raise ValueError(f"groups has shape {self.groups.shape} for {n} names")
        if n and not UNLABELLED <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(f"labels must lie in -1..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.names)
