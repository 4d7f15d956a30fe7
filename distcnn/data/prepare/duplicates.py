"""Images of the same bytes, found before the split so that none lies on both sides of it, and after it to warn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.prepare.pool import Pool
from distcnn.data.prepare.source import Ids, Report, Source
from distcnn.data.prepare.work import hash_payloads

TASK_SAMPLES = 512
TASK_BYTES = 32 << 20


def content_groups(source: Source, ids: Ids, pool: Pool, report: Report) -> Ids:
    """(n,) int64: equal where the images `ids` have the same bytes. Only images of equal size are read."""
    sizes = source.sizes[ids]
    _, place, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    groups = np.arange(len(ids), dtype=np.int64)
    doubtful = np.flatnonzero((counts[place] > 1) & (sizes > 0))
    first_of: dict[bytes, int] = {}
    done = 0
    for places, hashes in pool.map(hash_payloads, _tasks(source, ids, doubtful)):
        for at, content in zip(places, hashes, strict=True):
            if content:
                groups[at] = first_of.setdefault(content, at)
        done += len(places)
        report("duplicates?", done, len(doubtful))
    return groups


def _tasks(source: Source, ids: Ids, doubtful: Ids) -> Iterator[tuple[list[int], tuple[Any, ...]]]:
    places: list[int] = []
    size = 0
    for at in doubtful.tolist():
        places.append(at)
        size += int(source.sizes[ids[at]])
        if len(places) == TASK_SAMPLES or size >= TASK_BYTES:
            yield places, ([source.payload(int(ids[p])) for p in places], source.root)
            places, size = [], 0
    if places:
        yield places, ([source.payload(int(ids[p])) for p in places], source.root)


def merge_groups(first: Ids, second: Ids) -> Ids:
    """(n,) int64: the finest grouping in which images of one group of `first`, or of one of `second`, are together."""
    parent = np.arange(len(first) and int(first.max()) + 1, dtype=np.int64)

    def root(group: int) -> int:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = int(parent[group])
        return group

    met: dict[int, int] = {}
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        other = met.setdefault(b, a)
        if other != a:
            low, high = sorted((root(a), root(other)))
            parent[high] = low
    return np.array([root(group) for group in first.tolist()], dtype=np.int64)


def shared_between(hashes: dict[str, NDArray[np.void]], ids: dict[str, Ids], names: list[str]) -> tuple[str, ...]:
    """A line for each two splits that hold images of the same bytes, from (n,) hashes and ids of each split."""
    lines = []
    splits = list(hashes)
    for number, one in enumerate(splits):
        for other in splits[number + 1 :]:
            common, at_one, at_other = np.intersect1d(hashes[one], hashes[other], return_indices=True)
            if len(common):
                pair = f"{names[ids[other][at_other[0]]]} = {names[ids[one][at_one[0]]]}"
                lines.append(f"{len(common)} images of {other} have the same bytes as images of {one} ({pair} ...)")
    return tuple(lines)
