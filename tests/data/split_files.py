"""A split on disk for the loader's tests: real tars, real indexes, real JPEG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shard_files import jpg, write_tar

from distcnn.data.decode import jpeg_shape
from distcnn.data.manifest import Shard, Split
from distcnn.data.shards import SplitReader, make_index, samples_in

CLASSES = 5


def make_split(root: Path, counts: Sequence[int], sizes: Sequence[tuple[int, int]] = ((12, 12),)) -> Split:
    """Shards of `counts` samples; image i has the (height, width) sizes[i % len(sizes)] and the label i % 5."""
    shards, first = [], 0
    for number, count in enumerate(counts):
        members: list[tuple[str, bytes]] = []
        for i in range(first, first + count):
            members.append((f"{i:06d}.cls", str(i % CLASSES).encode()))
            members.append((f"{i:06d}.jpg", jpg(i, *sizes[i % len(sizes)])))
        shards.append(add_shard(root, f"train-{number:06d}", members, first, count))
        first += count
    return split_of(shards)


def split_of(shards: Sequence[Shard]) -> Split:
    total = sum(shard.samples for shard in shards)
    return Split(tuple(shards), tuple(len(range(label, total, CLASSES)) for label in range(CLASSES)))


def read_split(root: Path) -> Split:
    """The split that `make_split` wrote."""
    shards = [
        Shard(index.with_suffix(".tar").name, index.name, len(np.load(index)), index.with_suffix(".tar").stat().st_size)
        for index in sorted(root.glob("*.npy"))
    ]
    return split_of(shards)


def add_shard(root: Path, name: str, members: list[tuple[str, bytes]], first: int, count: int) -> Shard:
    """Write a tar and its index."""
    tar = write_tar(root / f"{name}.tar", members)
    rows, content = [], tar.read_bytes()
    for number, sample in enumerate(samples_in(tar), first):
        assert sample.image is not None
        at, size = sample.image.offset, sample.image.size
        height, width = jpeg_shape(content[at : at + size]) or (0, 0)
        rows.append((at, size, number % CLASSES, width, height, sample.key))
    assert len(rows) == count
    np.save(root / f"{name}.npy", make_index(rows))
    return Shard(f"{name}.tar", f"{name}.npy", count, tar.stat().st_size)


def make_reader(root: Path, counts: Sequence[int], sizes: Sequence[tuple[int, int]] = ((12, 12),)) -> SplitReader:
    return SplitReader(root, make_split(root, counts, sizes))
