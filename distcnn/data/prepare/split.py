"""Which image goes to train, val and test: stratified by class; groups, and images of the same bytes, kept together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from distcnn.data.prepare.source import Ids
from distcnn.errors import DataError, UserError

MAX_FOLDS = 20


@dataclass(frozen=True)
class Fractions:
    """Parts of the images that become val and test; train keeps the rest."""

    val: float = 0.1
    test: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise UserError(f"--val-fraction {self.val} and --test-fraction {self.test}: each from 0, together under 1")


@dataclass(frozen=True)
class Candidates:
    """The images to split: labels (n,), units (n,) that stay whole, class names, and how to speak of image i."""

    labels: Ids
    units: Ids
    classes: tuple[str, ...]
    tell: Callable[[int], str]
    grouped: bool  # the units are the user's groups, and may hold several classes


def stratified(images: Candidates, fractions: Fractions, seed: int) -> dict[str, Ids]:
    """Places (in 0..n-1) of train, val and test, each sorted.

    scikit-learn's stratified shuffle split, over one image of each unit; where the user gives groups,
    StratifiedGroupKFold, which comes as near to the fractions as the groups allow. Raises DataError naming a class
    that is too small to be in each split.
    """
    rest = np.arange(len(images.labels), dtype=np.int64)
    out: dict[str, Ids] = {}
    left = 1.0
    for number, (name, fraction) in enumerate((("test", fractions.test), ("val", fractions.val))):
        if fraction:
            rest, out[name] = _cut(images, rest, fraction / left, name, seed + number)
            left -= fraction
    out["train"] = rest
    return {name: out[name] for name in ("train", "val", "test") if name in out}


def _cut(images: Candidates, ids: Ids, fraction: float, name: str, seed: int) -> tuple[Ids, Ids]:
    """(kept, taken) of `ids`."""
    _, first = np.unique(images.units[ids], return_index=True)
    heads = ids[first]  # one image of each unit
    _check_classes(images, ids, heads, fraction, name)
    if images.grouped:
        taken = _group_folds(images, ids, fraction, seed)
    else:
        from sklearn.model_selection import train_test_split

        size = round(fraction * len(heads))
        _, chosen = train_test_split(heads, test_size=size, stratify=images.labels[heads], random_state=seed)
        taken = np.isin(images.units[ids], images.units[chosen])
    return ids[~taken], ids[taken]


def _check_classes(images: Candidates, ids: Ids, heads: Ids, fraction: float, name: str) -> None:
    """Refuse a class that cannot be on both sides, by name."""
    labels = images.labels[ids] if images.grouped else images.labels[heads]
    units = images.units[ids] if images.grouped else images.units[heads]
    for label in np.unique(labels):
        held = np.unique(units[labels == label])
        if len(held) < 2:
            row = int(ids[np.flatnonzero(images.units[ids] == held[0])[0]])
            count = int((images.labels[ids] == label).sum())
            what = "1 image" if count == 1 else f"{count} images, all of one group or of the same bytes"
            raise DataError(
                f"class {images.classes[label]!r} has {what} ({images.tell(row)}): it cannot be in both train and"
                f" {name}; add images, leave the class out, or use --{name}-fraction 0"
            )
    present = len(np.unique(labels))
    size = round(fraction * len(heads))
    if size < present and not images.grouped:
        enough = np.ceil(present / len(heads) * 100) / 100
        raise DataError(
            f"{name} would have {size} of {len(heads)} images, fewer than the {present} classes:"
            f" use --{name}-fraction {enough:g} or more, or 0"
        )


def _group_folds(
    images: Candidates, ids: Ids, fraction: float, seed: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """(n,) bool: the images of so many folds as make up the fraction."""
    from sklearn.model_selection import StratifiedGroupKFold

    labels, units = images.labels[ids], images.units[ids]
    most = min(MAX_FOLDS, len(np.unique(units)), int(np.bincount(labels).max()))
    parts = Fraction(fraction).limit_denominator(most)
    wanted, folds = max(parts.numerator, 1), max(parts.denominator, 2)
    taken = np.zeros(len(ids), dtype=np.bool_)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for number, (_, held) in enumerate(splitter.split(labels, labels, units)):
            if number < wanted:
                taken[held] = True
    missing = np.setdiff1d(labels, labels[~taken])
    if len(missing):
        raise DataError(
            f"with these groups no image of class {images.classes[missing[0]]!r} would be left for train:"
            " use another --seed, or smaller groups"
        )
    return taken
