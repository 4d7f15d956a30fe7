"""What to do about what was seen: plain sentences, the gravest first. A pure function of the facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distcnn.data.inspect.facts import Facts, SplitFacts
from distcnn.text import counted

LANES = 8  # parallel streams of a step by default: the most ranks that one run can use
IMBALANCE_SEEN, IMBALANCE_GRAVE = 1.5, 10.0
FEW_IMAGES = 20  # of a class in training
SHIFT = 0.05  # difference of channel means between splits, of 1
COMMON_SIDES = (32, 48, 64, 96, 128, 160, 192, 224)

Level = Literal["warning", "notice", "good"]


@dataclass(frozen=True)
class Advice:
    """A sentence or two, and how much it matters."""

    level: Level
    text: str


def advise(facts: Facts) -> list[Advice]:
    """All advice on a set, warnings first."""
    found = [*_leaks(facts), *_bad(facts), *_classes(facts), *_copies(facts), *_sizes(facts), *_splits(facts)]
    found += _shards(facts)
    return sorted(found, key=lambda advice: ("warning", "notice", "good").index(advice.level))


def training_split(facts: Facts) -> SplitFacts:
    """The split called train, else the largest."""
    named = [split for split in facts.splits if split.name == "train"]
    return named[0] if named else max(facts.splits, key=lambda split: split.images)


def training_side(facts: Facts) -> int:
    """Side in pixels to train at: that of uniform images up to 224, else the largest common one that images fill."""
    side = min(facts.uniform) if facts.uniform else facts.short_side
    if facts.uniform and side <= COMMON_SIDES[-1]:
        return side
    return max((common for common in COMMON_SIDES if common <= side), default=COMMON_SIDES[0])


def _leaks(facts: Facts) -> Iterator[Advice]:
    sizes = {split.name: split.images for split in facts.splits}
    for leak in facts.likeness.leaks:
        share = 100 * (leak.exact + leak.near) / sizes[leak.split]
        level: Level = "warning" if leak.exact or share >= 0.1 else "notice"
        yield Advice(
            level,
            f"{leak.split} shares {counted(leak.exact + leak.near, 'image')} with {leak.other} ({share:.3g} % of"
            f" {leak.split}): {leak.exact:,} of the same bytes, {leak.near:,} that look alike. What is measured on"
            f" {leak.split} is flattered by them.",
        )
    if len(facts.splits) > 1 and not facts.likeness.leaks:
        yield Advice("good", "No image is in two splits, neither byte for byte nor to the eye.")


def _bad(facts: Facts) -> Iterator[Advice]:
    if facts.undecodable:
        yield Advice(
            "warning",
            f"{counted(len(facts.undecodable), 'image')} of the set cannot be decoded: training would meet them again"
            " and again. Index the set with --verify, or prepare it again.",
        )
    if facts.quarantined:
        yield Advice(
            "notice", f"{counted(len(facts.quarantined), 'image')} left out when the set was made (see the list)."
        )


def _classes(facts: Facts) -> Iterator[Advice]:
    train = training_split(facts)
    if not train.labelled:
        yield Advice("warning", f"{train.name} has no labels: nothing can be trained on it.")
        return
    counts = train.class_counts
    if len(facts.classes) < 2:
        yield Advice("warning", "There is one class only: any model is right on all images.")
    if (counts == 0).any():
        yield Advice("warning", f"No image in {train.name} of {_named(facts, np.flatnonzero(counts == 0))}.")
    if train.imbalance >= IMBALANCE_SEEN:
        grave = train.imbalance >= IMBALANCE_GRAVE
        yield Advice(
            "warning" if grave else "notice",
            f"Imbalance {train.imbalance:.1f}: {facts.classes[int(counts.argmax())]!r} has {counts.max():,} images,"
            f" {facts.classes[int(np.where(counts > 0, counts, counts.max()).argmin())]!r}"
            f" {counts[counts > 0].min():,}. Read macro F1 and the recall of each class beside top-1.",
        )
    elif counts.all():
        yield Advice("good", f"The classes are balanced (imbalance {train.imbalance:.2f}).")
    few = np.flatnonzero((counts > 0) & (counts < FEW_IMAGES))
    if len(few):
        yield Advice("notice", f"Fewer than {FEW_IMAGES} training images of {_named(facts, few)}.")
    for split in facts.splits:
        if split.labelled and ((split.class_counts > 0) & (counts == 0)).any():
            yield Advice("warning", f"{split.name} has classes that {train.name} lacks.")


def _copies(facts: Facts) -> Iterator[Advice]:
    like = facts.likeness
    if like.conflicts_exact:
        pairs = counted(like.conflicts_exact, "pair")
        yield Advice("warning", f"{pairs} of the same bytes have different labels: in each, one label is wrong.")
    if like.conflicts > like.conflicts_exact:
        pairs = counted(like.conflicts - like.conflicts_exact, "pair")
        yield Advice("notice", f"{pairs} of look-alikes with different labels: where it is one picture, one is wrong.")
    if like.copies or like.near:
        level: Level = "notice" if like.copies + like.near > facts.images / 200 else "good"
        yield Advice(
            level,
            f"{counted(like.copies, 'image repeats', 'images repeat')} another byte for byte,"
            f" {counted(like.near, 'pair looks', 'pairs look')} alike ({counted(len(like.groups), 'group')} of up to"
            f" {len(like.groups[0]):,} images).",
        )


def _sizes(facts: Facts) -> Iterator[Advice]:
    if not facts.images:
        return
    side = training_side(facts)
    if facts.uniform:
        width, height = facts.uniform
        yield Advice("good", f"All images are {width} x {height}: train at --image-size {side}.")
    else:
        yield Advice(
            "good",
            f"The shorter side is {facts.short_side} pixels in the median: train at --image-size {side}.",
        )
        if facts.short_side > 2 * side:
            yield Advice(
                "notice",
                f"Images are more than twice as large as is trained on: 'distcnn prepare --max-side {2 * side}' would"
                " make decoding faster.",
            )
    smaller = int((np.minimum(facts.columns.width, facts.columns.height) < side / 2).sum())
    if smaller:
        yield Advice("notice", f"{counted(smaller, 'image')} less than half as large as --image-size {side}.")


def _splits(facts: Facts) -> Iterator[Advice]:
    if not any(split.name in ("val", "validation", "test") for split in facts.splits):
        yield Advice("notice", "There is neither a val nor a test split: nothing to evaluate on.")
    train = training_split(facts)
    for split in facts.splits:
        if split is not train and split.mean and train.mean:
            shift = max(abs(a - b) for a, b in zip(split.mean, train.mean, strict=True))
            if shift > SHIFT:
                yield Advice("notice", f"The mean colours of {split.name} and {train.name} are {shift:.2f} apart.")
    if facts.images and facts.columns.gray.all():
        yield Advice("notice", "All images are gray.")


def _shards(facts: Facts) -> Iterator[Advice]:
    train = training_split(facts)
    sizes = [size for size in train.shard_samples if size]
    if not sizes:
        return
    if len(sizes) < LANES:
        yield Advice(
            "notice",
            f"{counted(len(sizes), 'shard')} in {train.name}: exact on any number of ranks, but {LANES} ranks would"
            f" read the same shards. From remote or network storage, {LANES} shards or more read better.",
        )
    else:
        yield Advice("good", f"{len(sizes)} shards in {train.name} keep {LANES} ranks on shards of their own.")
    if max(sizes) > 10 * min(sizes) and len(sizes) > 2:
        yield Advice("notice", f"Shards hold {min(sizes):,} to {max(sizes):,} samples: exact, but read less evenly.")


def _named(facts: Facts, labels: NDArray[np.intp]) -> str:
    names = ", ".join(repr(facts.classes[int(label)]) for label in labels[:5])
    return f"{names} and {len(labels) - 5:,} more classes" if len(labels) > 5 else names
