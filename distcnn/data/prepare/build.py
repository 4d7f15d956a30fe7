"""A source to a data set on disk: split, shuffle, pack in parallel, write; all of it appears, or nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.manifest import UNLABELLED, Manifest, Quarantined, Split
from distcnn.data.order import permutation
from distcnn.data.prepare.duplicates import content_groups, merge_groups, shared_between
from distcnn.data.prepare.handover import slots
from distcnn.data.prepare.images import Policy
from distcnn.data.prepare.keys import make_keys, names_tell
from distcnn.data.prepare.pool import Pool, usable_cores
from distcnn.data.prepare.source import FREE, SPLITS, Ids, Report, Source
from distcnn.data.prepare.split import Candidates, Fractions, stratified
from distcnn.data.prepare.staging import Staging, existing
from distcnn.data.prepare.stats import Sums
from distcnn.data.prepare.work import HASH_BYTES, Part, Task, pack
from distcnn.data.prepare.writer import Limits, ShardWriter
from distcnn.errors import DataError, UserError

PREPARE_VERSION = 2
SHUFFLE = 16  # the purpose of the random words that shuffle a split before it is cut into shards
TASK_SAMPLES = 256
TASK_BYTES = 8 << 20
DEFAULT_VAL = 0.1
ALONE_SECONDS = 0.3  # of work that one process has done before others have started
IMAGE_SECONDS, BYTE_SECONDS = 30e-6, 15e-9  # measured: 32 px JPEGs, and 500 px JPEGs, on one core
ALWAYS_ALLOWED_BAD = 10
MAX_SEED = 2**32 - 2  # scikit-learn takes 32 bits, and test has a seed of its own


@dataclass(frozen=True)
class Settings:
    """How a source becomes a data set. All but `workers` and `max_bad` decide what comes out, to the byte.

    `val_fraction` None: 0.1 of what the source leaves open, 0 where it gives train. `max_bad`:
    images that may be left out, under 1 a part of all (10 are allowed in any case), from 1 a number; 0 = none.
    `workers` 0: one a core.
    """

    val_fraction: float | None = None
    test_fraction: float = 0.0
    seed: int = 0
    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    max_bad: float = 0.01
    workers: int = 0

    def __post_init__(self) -> None:
        Fractions(self.val_fraction or 0.0, self.test_fraction)
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"--seed {self.seed}: from 0 to {MAX_SEED}")
        if self.max_bad < 0 or self.workers < 0:
            raise UserError(f"--max-bad {self.max_bad}, --workers {self.workers}: not under 0")

    def facts(self) -> dict[str, Any]:
        """What decides the bytes that come out, for the manifest and to recognise the same set again."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("workers", "max_bad")}
        return facts | {"version": PREPARE_VERSION}

    def allowed_bad(self, images: int) -> int:
        if self.max_bad == 0 or self.max_bad >= 1:
            return int(self.max_bad)
        return max(ALWAYS_ALLOWED_BAD, int(self.max_bad * images))


@dataclass(frozen=True)
class Outcome:
    """What was done. `made` is False where the same set was there already."""

    manifest: Manifest
    made: bool
    seconds: float
    warnings: tuple[str, ...] = ()


def _silent(stage: str, done: int, total: int) -> None:
    """For callers that show no progress."""


def build(
    source: Source,
    output: Path,
    settings: Settings,
    report: Report = _silent,
    overwrite: bool = False,
    pool: Pool | None = None,
) -> Outcome:
    """Make the data set of `source` in `output`. Raises UserError or DataError with nothing left behind.

    `pool`: worker processes that are there already; without it they are started here, where they are worth it.
    """
    start = time.monotonic()
    identity = _identity(source, settings)
    found = existing(output)
    if found is not None and "identity" not in found.source:
        raise UserError(f"{output} holds a data set that prepare did not make ({found.name!r}): give another --output")
    if found is not None and not overwrite:
        if found.source["identity"] == identity:
            return Outcome(found, False, time.monotonic() - start)
        raise UserError(
            f"{output} holds another data set ({found.name!r}, or made with other settings):"
            " give another --output, or --overwrite to replace it"
        )
    with Staging(output) as staging:
        try:
            source.unpack(staging.folder)
            with _pool(source, settings, pool) as workers, slots(workers.window) as handover:
                splits = assign(source, settings, workers, report)
                work = _Work(source, splits, settings, staging.folder, report)
                done = work.run(workers, handover)
            facts = {"kind": source.kind, **source.facts, "settings": settings.facts(), "identity": identity}
            manifest = Manifest(
                source.name, source.classes, done, work.sums.stats(), tuple(sorted(work.bad, key=_by_name)), facts
            )
            staging.publish(manifest)
        except OSError as error:
            raise UserError(f"cannot write to {output}: {error.strerror or error}; nothing of it was kept") from error
    return Outcome(manifest, True, time.monotonic() - start, (*source.warnings, *work.warnings()))


def _pool(source: Source, settings: Settings, given: Pool | None) -> AbstractContextManager[Pool]:
    """As many workers as asked for, one where there is little to do. What was given is for its owner to end."""
    seconds = len(source) * IMAGE_SECONDS + int(source.sizes.sum()) * BYTE_SECONDS
    if seconds <= ALONE_SECONDS:
        return Pool(1)
    return Pool(settings.workers or usable_cores()) if given is None else nullcontext(given)


def assign(source: Source, settings: Settings, pool: Pool, report: Report) -> dict[str, Ids]:
    """The ids of each split, as the source gives them; what it leaves open is split by the settings' fractions.

    Where the source gives train but no val, a val fraction asked for is taken out of its train.
    """
    split_of = source.split_of
    given = {SPLITS[at] for at in np.unique(split_of) if at != FREE}
    default = DEFAULT_VAL if "train" not in given else 0.0
    fractions = Fractions(default if settings.val_fraction is None else settings.val_fraction, settings.test_fraction)
    for name, fraction in (("val", fractions.val), ("test", fractions.test)):
        if fraction and name in given:
            raise UserError(
                f"--{name}-fraction {fraction}: the source has a {name} split of its own; leave the flag out"
            )
    if "train" in given and (fractions.val or fractions.test):
        split_of = np.where(split_of == SPLITS.index("train"), FREE, split_of)
    out = {name: np.flatnonzero(split_of == at) for at, name in enumerate(SPLITS)}
    free = np.flatnonzero(split_of == FREE)
    if len(free):
        units = np.arange(len(free), dtype=np.int64) if source.groups is None else source.groups[free]
        if fractions.val or fractions.test:
            units = merge_groups(units, content_groups(source, free, pool, report))
        images = Candidates(
            source.labels[free], units, source.classes, lambda i: source.tell(int(free[i])), source.groups is not None
        )
        for name, places in stratified(images, fractions, settings.seed).items():
            out[name] = np.sort(np.concatenate([out[name], free[places]]))
    return {name: ids for name, ids in out.items() if len(ids)}


class _Work:
    """The packing of all splits, and what is learned on the way."""

    def __init__(
        self, source: Source, splits: dict[str, Ids], settings: Settings, folder: Path, report: Report
    ) -> None:
        self.source, self.splits, self.settings, self.folder, self.report = source, splits, settings, folder, report
        self.keys = make_keys(source)
        self._names_tell = names_tell(source, self.keys)
        self.sums = Sums()
        self.bad: list[Quarantined] = []
        self._good: dict[str, list[Ids]] = {}
        self._hashes: dict[str, list[bytes]] = {}
        self._empty: list[str] = []
        # Splits that the source gives may share images; those cut here cannot, by the search for duplicates before.
        self._hashing = len(splits) > 1 and bool((source.split_of != FREE).any())

    def run(self, pool: Pool, slots: Iterator[str]) -> dict[str, Split]:
        """Write the shards of every split into the folder; workers hand over their parts in `slots`, in turn."""
        return {name: self._split(name, number, pool, slots) for number, name in enumerate(self.splits)}

    def warnings(self) -> tuple[str, ...]:
        """What the user should know: classes without a good image, images of the same bytes in two splits."""
        if not self._hashing:
            return tuple(self._empty)
        ids = {name: np.concatenate(parts) for name, parts in self._good.items()}
        hashes = {name: np.frombuffer(b"".join(parts), dtype=f"V{HASH_BYTES}") for name, parts in self._hashes.items()}
        return (*self._empty, *shared_between(hashes, ids, self.source.names))

    def _split(self, name: str, number: int, pool: Pool, slots: Iterator[str]) -> Split:
        ids = self.splits[name]
        order = ids[permutation(len(ids), self.settings.seed, SHUFFLE, number)]
        counts = np.zeros(len(self.source.classes), dtype=np.int64)
        good, hashes = self._good.setdefault(name, []), self._hashes.setdefault(name, [])
        seen = 0
        with ShardWriter(self.folder, name, self.settings.limits) as writer:
            tasks = self._tasks(order, name == "train", slots)
            for chosen, part in pool.map(pack, tasks):
                writer.add(part)
                self.sums.merge(part.sums)
                labels = part.rows["label"]
                counts += np.bincount(labels[labels != UNLABELLED], minlength=len(counts))
                good.append(chosen[part.good])
                hashes.append(part.hashes)
                self._quarantine(name, chosen, part)
                seen += len(chosen)
                self.report(name, seen, len(order))
            shards = writer.finish()
        if not sum(map(len, good)):
            raise DataError(f"no image of {name} can be used (the first: {self.bad[-1].name}: {self.bad[-1].reason})")
        labelled = bool((self.source.labels[ids] != UNLABELLED).any())
        if name == "train" and not counts.all():
            lost = self.source.classes[int(np.flatnonzero(counts == 0)[0])]
            self._empty.append(f"class {lost!r} has no image in train")
        return Split(shards, tuple(counts.tolist()) if labelled else ())

    def _tasks(
        self, order: Ids, count_pixels: bool, slots: Iterator[str]
    ) -> Iterator[tuple[Ids, tuple[Task, Policy, bool, bool, str]]]:
        """The images of a split in runs of at most TASK_SAMPLES and about TASK_BYTES."""
        for ids in cut_by_size(order, self.source.sizes, TASK_SAMPLES, TASK_BYTES):
            places = ids.tolist()
            source = self.source
            task = Task(
                keys=[self.keys[i] for i in places],
                names=[source.names[i] for i in places] if self._names_tell else [""] * len(places),
                labels=source.labels[ids].tolist(),
                payloads=[source.payload(i) for i in places],
                root=source.root,
            )
            yield ids, (task, self.settings.policy, count_pixels, self._hashing, next(slots))

    def _quarantine(self, name: str, chosen: NDArray[np.int64], part: Part) -> None:
        """Note the images that were left out; too many of them end the work."""
        for place, reason in zip(part.bad, part.reasons, strict=True):
            self.bad.append(Quarantined(self.source.names[chosen[place]], reason, name))
        allowed = self.settings.allowed_bad(len(self.source))
        if len(self.bad) > allowed:
            last = self.bad[-1]
            raise DataError(
                f"more than {allowed} of {len(self.source)} images cannot be used (the last one: {last.name}:"
                f" {last.reason}): mend or remove them, or allow more with --max-bad"
            )


def cut_by_size(ids: Ids, sizes: Ids, most: int, most_bytes: int) -> Iterator[Ids]:
    """Runs of `ids` (n,) of at most `most`, ended as soon as their sizes reach `most_bytes`."""
    ends = np.cumsum(sizes[ids])
    start = 0
    while start < len(ids):
        before = int(ends[start - 1]) if start else 0
        stop = min(int(np.searchsorted(ends, before + most_bytes)) + 1, start + most)
        yield ids[start:stop]
        start = stop


def _by_name(row: Quarantined) -> tuple[str, str]:
    return row.split, row.name


def _identity(source: Source, settings: Settings) -> str:
    """sha256 (hex) of all that decides what comes out: the source's digest, its splits and the settings."""
    facts = [source.kind, source.name, source.classes, source.digest, settings.facts()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
