"""Some images of a set read again and laid out as contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distcnn.data.decode import decode
from distcnn.data.inspect.facts import Facts
from distcnn.data.manifest import Manifest
from distcnn.data.shards import load_index
from distcnn.data.sources import is_remote, open_shard
from distcnn.pictures import sheet, tile

CLASS_SAMPLES = 8
MAX_CLASSES_SHOWN = 60
MAX_PAIRS_SHOWN = 24

Places = NDArray[np.int64]


class Album:
    """Thumbnails of chosen images: read once, shard by shard, when they are asked for."""

    def __init__(self, root: Path, manifest: Manifest, facts: Facts) -> None:
        self._root, self._manifest, self._facts = root, manifest, facts
        self._tiles: dict[int, Image.Image] = {}
        self._names: dict[int, str] = {}

    def load(self, places: Places) -> None:
        """Read the images at `places` of the columns, in the order in which they lie in their shards."""
        columns = self._facts.columns
        wanted = np.array(sorted({int(place) for place in places} - set(self._tiles)), dtype=np.int64)
        for split, shard in {(int(columns.split[p]), int(columns.shard[p])) for p in wanted}:
            mine = wanted[(columns.split[wanted] == split) & (columns.shard[wanted] == shard)]
            entry = list(self._manifest.splits.values())[split].shards[shard]
            rows = load_index(self._root / entry.index, entry)
            with open_shard(entry.name if is_remote(entry.name) else str(self._root / entry.name)) as (read, _):
                for place in mine.tolist():
                    row = rows[int(columns.row[place])]
                    data = read(int(row["offset"]), int(row["size"]))
                    self._tiles[place] = tile(Image.fromarray(decode(data)))
                    self._names[place] = f"{entry.name}/{row['key'].decode('utf-8', 'backslashreplace')}"

    def name(self, place: int) -> str:
        """Shard and key of a loaded image."""
        return self._names[place]

    def sheet(self, places: Places, columns: int = 0) -> str:
        """A data: URI of loaded images side by side, in rows of `columns` (0 = one row)."""
        return sheet([self._tiles[int(place)] for place in places], columns)


def samples_of_classes(facts: Facts, split: str) -> list[tuple[int, Places]]:
    """(label, places of up to CLASS_SAMPLES images) of the first classes of a split, evenly spread over each class."""
    mine = np.flatnonzero(facts.of_split(split))
    labels = facts.columns.label[mine]
    order = np.argsort(labels, kind="stable")
    chosen: list[tuple[int, Places]] = []
    for label in range(min(len(facts.classes), MAX_CLASSES_SHOWN)):
        first, last = np.searchsorted(labels[order], [label, label + 1])
        if first == last:
            continue
        spread = np.unique(np.linspace(first, last - 1, min(CLASS_SAMPLES, last - first)).astype(int))
        chosen.append((label, mine[order[spread]]))
    return chosen


def pairs_to_show(facts: Facts) -> Places:
    """(P, 2) pairs worth a look: those of different labels, then those across splits, then the rest; one a group."""
    like = facts.likeness
    if not len(like.pairs):
        return like.pairs
    labels, splits = facts.columns.label[like.pairs], facts.columns.split[like.pairs]
    conflict = (labels[:, 0] != labels[:, 1]) & (labels >= 0).all(axis=1)
    across = splits[:, 0] != splits[:, 1]
    rank = np.where(conflict, 0, np.where(across, 1, 2))
    group_of = {int(place): number for number, members in enumerate(like.groups) for place in members}
    shown: list[int] = []
    seen: set[int] = set()
    for at in np.lexsort((-like.score, rank)).tolist():
        group = group_of[int(like.pairs[at, 0])]
        if group not in seen:
            seen.add(group)
            shown.append(at)
        if len(shown) == MAX_PAIRS_SHOWN:
            break
    return like.pairs[shown]
