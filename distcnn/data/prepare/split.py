"""Which image goes to train, val and test: stratified by class, with groups and duplicates kept together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distcnn.data.prepare.source import Labels
from distcnn.errors import DataError, UserError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Fractions:
    """Parts of the images that become val and test; train keeps the rest."""

    val: float = 0.1
    test: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise UserError(f"--val-fraction {self.val} and --test-fraction {self.test}: each 0..1, together under 1")


def stratified(
    labels: Labels, fractions: Fractions, seed: int, classes: tuple[str, ...], where: Callable[[int], str]
) -> dict[str, Ids]:
    """Ids (positions in `labels`) of train, val and test, each sorted, by scikit-learn's stratified shuffle split.

    Raises DataError naming a class too small to have an image in each split; `where(i)` says which image that is.
    """
    rest = np.arange(len(labels), dtype=np.int64)
    out: dict[str, Ids] = {}
    for number, (name, fraction) in enumerate((("test", fractions.test), ("val", fractions.val))):
        if fraction:
            size = round(fraction * len(labels))
            rest, out[name] = _cut(rest, labels, size, name, seed + number, classes, where)
    out["train"] = rest
    return {name: out[name] for name in ("train", "val", "test") if name in out}


def _cut(
    ids: Ids,
    labels: Labels,
    size: int,
    name: str,
    seed: int,
    classes: tuple[str, ...],
    where: Callable[[int], str],
) -> tuple[Ids, Ids]:
    """(kept, taken) of `ids`, `size` taken, the classes in proportion."""
    counts = np.bincount(labels[ids], minlength=len(classes))
    present = np.flatnonzero(counts)
    for label in present[counts[present] < 2]:
        row = int(ids[labels[ids] == label][0])
        raise DataError(
            f"class {classes[label]!r} has 1 image ({where(row)}), which cannot be in both train and {name}:"
            f" add images of it, leave it out, or use --{name}-fraction 0"
        )
    if size < len(present):
        raise DataError(
            f"{name} would have {size} of {len(labels)} images, fewer than the {len(present)} classes:"
            f" use at least --{name}-fraction {np.ceil(len(present) / len(labels) * 1000) / 1000:g}"
        )
    from sklearn.model_selection import train_test_split

    kept, taken = train_test_split(ids, test_size=size, stratify=labels[ids], random_state=seed)
    return np.sort(kept), np.sort(taken)
