"""A small data set out of a large one: its own images, where they lie, by indexes with fewer rows. numpy only.

Nothing is copied: the shards of the small set are the tars of the large one, with an index that lists some of their
samples. So a few steps make a whole epoch, with its ragged last step, its ledger and its evaluation.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from distcnn.data.manifest import Manifest, Shard, Split, save_manifest
from distcnn.data.order import Geometry, Ids
from distcnn.data.shards import SplitReader

SHARDS = 5  # of a split of the small set, of different sizes: more would only open more files


def ragged_samples(available: int, geometry: Geometry, steps: int) -> int:
    """How many samples make `steps` steps of which the last is ragged, if there are so many.

    The last step has a little more than half a batch, so that its tiles differ in size.
    """
    batch, lanes = geometry.global_batch, geometry.lanes
    rest = min(batch // 2 + max(lanes // 2, 1), batch - 1)
    wanted = min((steps - 1) * batch + max(rest, 1), available)
    return wanted - 1 if wanted % batch == 0 and wanted > 1 and batch > 1 else wanted


def make_subset(root: Path, manifest: Manifest, sizes: dict[str, int], folder: Path) -> Manifest:
    """Write the data set `folder` of `sizes[split]` samples of each of these splits, spread over all of it.

    Classes and image statistics stay those of the whole set, so that the model and its inputs do. Raises DataError
    for an index that cannot be read.
    """
    folder.mkdir(parents=True)
    splits = {}
    for name, samples in sizes.items():
        reader = SplitReader(root, manifest.split(name))
        ids = spread(reader.counts, samples)
        splits[name] = _write_split(reader, name, ids, len(manifest.classes), folder)
        reader.close()
    small = dataclasses.replace(manifest, splits=splits, quarantined=(), source={"subset of": manifest.name})
    save_manifest(small, folder)
    return small


def spread(counts: Ids, samples: int) -> Ids:
    """(samples,) rising ids, evenly spread over at most SHARDS of the shards of `counts` samples (all, if few)."""
    filled = np.flatnonzero(counts)
    first_id = np.concatenate([[0], np.cumsum(counts)])
    chosen = filled[np.unique(np.linspace(0, len(filled) - 1, min(SHARDS, len(filled))).round().astype(np.int64))]
    if counts[chosen].sum() < samples:
        chosen = filled
    pool = np.concatenate([np.arange(first_id[s], first_id[s] + counts[s]) for s in chosen])
    return pool[np.linspace(0, len(pool) - 1, samples).round().astype(np.int64)]


def _write_split(reader: SplitReader, name: str, ids: Ids, classes: int, folder: Path) -> Split:
    """Indexes of uneven sizes that cover `ids`, each of samples of one tar."""
    shards, rows = reader.locate(ids)
    cuts = set((np.flatnonzero(np.diff(shards)) + 1).tolist())
    cuts |= {len(ids) * k * k // SHARDS**2 for k in range(1, SHARDS)}  # the k-th piece has a share of 2k - 1
    edges = sorted(cuts - {0, len(ids)})
    pieces: list[Shard] = []
    for number, part in enumerate(np.split(np.arange(len(ids)), edges)):
        shard = reader.split.shards[int(shards[part[0]])]
        index = f"{name}-{number:04d}.npy"
        np.save(folder / index, np.asarray(reader.index(int(shards[part[0]]))[rows[part]]))
        path = shard.name if "://" in shard.name else str((reader.root / shard.name).resolve())
        pieces.append(dataclasses.replace(shard, name=path, index=index, samples=len(part)))
    counts = np.bincount(reader.labels(ids), minlength=classes)
    return Split(tuple(pieces), tuple(counts.tolist()))
