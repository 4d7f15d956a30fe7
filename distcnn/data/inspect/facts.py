"""What the scan of a set says, summed up: everything that tables, plots, page and advice show."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcnn.console import Console
from distcnn.data.inspect.near import Pairs, alike, groups, near_pairs, same_details
from distcnn.data.inspect.scan import Columns, Scan, scan
from distcnn.data.manifest import Manifest
from distcnn.data.parallel import SILENT

EXTREMES = 8


@dataclass(frozen=True)
class SplitFacts:
    """One split. `class_counts` and `class_bytes` are (K,), empty where there are no labels; mean and std 0 to 1."""

    name: str
    images: int
    bytes: int
    shard_samples: tuple[int, ...]
    class_counts: NDArray[np.int64]
    class_bytes: NDArray[np.int64]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    brightness: float
    formats: Counter[tuple[str, str]]

    @property
    def labelled(self) -> bool:
        return len(self.class_counts) > 0

    @property
    def imbalance(self) -> float:
        """Images of the largest class over those of the smallest that has any; 1 without labels."""
        held = self.class_counts[self.class_counts > 0]
        return float(held.max() / held.min()) if len(held) else 1.0


@dataclass(frozen=True)
class Leak:
    """Images of `split` that `other` has too: the same bytes, or the same picture (those not among the former)."""

    split: str
    other: str
    exact: int
    near: int


@dataclass(frozen=True)
class Likeness:
    """Images that are the same. `copies` are those of the same bytes but the first of each, over all splits.

    `pairs` (P, 2) are places of look-alikes with their `score` (P,): 2 for the same bytes, else the correlation of
    their details. `groups` are sets of images that pairs join. `conflicts` is how many pairs have different labels,
    `conflicts_exact` how many of these have the same bytes.
    """

    copies: int
    pairs: Pairs
    score: NDArray[np.float32]
    groups: list[NDArray[np.int64]]
    leaks: tuple[Leak, ...]
    conflicts: int
    conflicts_exact: int
    radius: int  # bits of the perceptual hash by which look-alikes may differ
    least: float  # correlation of their details

    @property
    def near(self) -> int:
        """Pairs that look alike and have different bytes."""
        return int((self.score < 2).sum())


@dataclass(frozen=True)
class Facts:
    """A set seen. `extremes` are places by title; `mean_image` is (S, S, 3) uint8 of the first split."""

    name: str
    classes: tuple[str, ...]
    splits: tuple[SplitFacts, ...]
    columns: Columns
    likeness: Likeness
    extremes: dict[str, NDArray[np.int64]]
    mean_image: NDArray[np.uint8]
    quarantined: tuple[tuple[str, str, str], ...]  # (split, name, reason)
    undecodable: tuple[tuple[str, str, str], ...]

    @property
    def images(self) -> int:
        return len(self.columns)

    @property
    def uniform(self) -> tuple[int, int] | None:
        """(width, height) where all images have the same size."""
        width, height = self.columns.width, self.columns.height
        if len(width) and width.min() == width.max() and height.min() == height.max():
            return int(width[0]), int(height[0])
        return None

    @property
    def short_side(self) -> int:
        """Median of the shorter side in pixels."""
        return int(np.median(np.minimum(self.columns.width, self.columns.height))) if self.images else 0

    def of_split(self, name: str) -> NDArray[np.bool_]:
        """(N,) which images are in a split."""
        return np.asarray(self.columns.split == [split.name for split in self.splits].index(name))


def inspect_data_set(root: Path, manifest: Manifest, workers: int = 0, console: Console = SILENT) -> Facts:
    """Scan a set and sum up. Raises DataError for what cannot be read."""
    scanned = scan(root, manifest, workers, console)
    return sum_up(manifest, scanned)


def sum_up(manifest: Manifest, scanned: Scan) -> Facts:
    """The facts of a scan."""
    columns = scanned.columns
    names = tuple(manifest.splits)
    first = scanned.mean_image[names[0]] if names else np.zeros((1, 1, 3))
    return Facts(
        name=manifest.name,
        classes=manifest.classes,
        splits=tuple(_split_facts(manifest, scanned, number, name) for number, name in enumerate(names)),
        columns=columns,
        likeness=likeness(columns, names),
        extremes=_extremes(columns),
        mean_image=np.rint(first).astype(np.uint8),
        quarantined=tuple((row.split, row.name, row.reason) for row in manifest.quarantined),
        undecodable=tuple((split, f"{shard}/{key}", reason) for split, shard, key, reason in scanned.bad),
    )


def _split_facts(manifest: Manifest, scanned: Scan, number: int, name: str) -> SplitFacts:
    columns = scanned.columns
    mine = columns.split == number
    split = manifest.splits[name]
    labels, sizes = columns.label[mine], columns.bytes[mine]
    stats = scanned.sums[name].stats()
    counts = sized = np.empty(0, dtype=np.int64)
    if split.labelled and (labels >= 0).all():
        counts = np.bincount(labels, minlength=len(manifest.classes))
        sized = np.bincount(labels, weights=sizes, minlength=len(manifest.classes)).astype(np.int64)
    return SplitFacts(
        name=name,
        images=int(mine.sum()),
        bytes=int(sizes.sum()),
        shard_samples=tuple(shard.samples for shard in split.shards),
        class_counts=counts,
        class_bytes=sized,
        mean=stats.mean,
        std=stats.std,
        brightness=float(columns.brightness[mine].mean()) if mine.any() else 0.0,
        formats=scanned.formats[name],
    )


def likeness(columns: Columns, names: tuple[str, ...]) -> Likeness:
    """Find the images that are the same, in bytes or to the eye."""
    _, group, size = np.unique(columns.digest, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    again = np.flatnonzero(np.diff(group[order]) == 0)
    exact = np.stack([order[again], order[again + 1]], axis=1)  # of equal ones, each with its next
    candidates, radius = near_pairs(columns.hash)
    candidates = candidates[group[candidates[:, 0]] != group[candidates[:, 1]]]
    least = same_details(columns.thumb, columns.label)
    near, score = alike(columns.thumb, candidates, least)
    pairs = np.concatenate([exact, near])
    differ = (columns.label[pairs[:, 0]] != columns.label[pairs[:, 1]]) & (columns.label[pairs] >= 0).all(axis=1)
    return Likeness(
        copies=int((size - 1).sum()),
        pairs=pairs,
        score=np.concatenate([np.full(len(exact), 2, dtype=np.float32), score]),
        groups=groups(pairs),
        leaks=tuple(_leaks(columns, names, group, near)),
        conflicts=int(differ.sum()),
        conflicts_exact=int(differ[: len(exact)].sum()),
        radius=radius,
        least=least,
    )


def _leaks(columns: Columns, names: tuple[str, ...], group: NDArray[np.int64], near: Pairs) -> list[Leak]:
    """For each two splits, what the smaller one shares with the larger."""
    leaks: list[Leak] = []
    for one, other in combinations(range(len(names)), 2):
        small, large = sorted((one, other), key=lambda number: (int((columns.split == number).sum()), -number))
        in_small, in_large = columns.split == small, columns.split == large
        exact = in_small & np.isin(group, group[in_large])
        ends = np.concatenate([near, near[:, ::-1]])
        touched = ends[in_small[ends[:, 0]] & in_large[ends[:, 1]], 0]
        close = np.setdiff1d(touched, np.flatnonzero(exact))
        if exact.any() or len(close):
            leaks.append(Leak(names[small], names[large], int(exact.sum()), len(close)))
    return leaks


def _extremes(columns: Columns) -> dict[str, NDArray[np.int64]]:
    """The first EXTREMES images in some orders; by file size where all have the same number of pixels."""
    pixels = columns.width.astype(np.int64) * columns.height
    same = len(pixels) > 0 and pixels.min() == pixels.max()
    size, unit = (columns.bytes, " file") if same else (pixels, "")
    orders = {
        "Brightest": -columns.brightness,
        "Darkest": columns.brightness,
        f"Largest{unit}": -size,
        f"Smallest{unit}": size,
    }
    return {title: np.argsort(values, kind="stable")[:EXTREMES] for title, values in orders.items()}
