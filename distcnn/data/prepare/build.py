"""A source to a data set on disk: split, shuffle, pack in parallel, write; all of it appears, or nothing."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.manifest import Manifest, Quarantined, Split
from distcnn.data.order import permutation
from distcnn.data.prepare.images import Policy
from distcnn.data.prepare.source import Source
from distcnn.data.prepare.split import Fractions, stratified
from distcnn.data.prepare.staging import Staging, existing
from distcnn.data.prepare.stats import Sums
from distcnn.data.prepare.work import Item, Part, pack
from distcnn.data.prepare.writer import Limits, ShardWriter
from distcnn.errors import DataError, UserError

PREPARE_VERSION = 1
SHUFFLE = 16  # the purpose of the random words that shuffle a split before it is cut into shards
TASK_SAMPLES = 256
TASK_BYTES = 8 << 20
MAX_KEY = 90  # bytes; ".json" still fits the 100 of a tar header
FEW = 4096  # images that one process has prepared before others would have started

Report = Callable[[str, int, int], None]  # (split, images done, images in all)


@dataclass(frozen=True)
class Settings:
    """How a source becomes a data set. All but `workers` decide what comes out, to the byte."""

    fractions: Fractions = field(default_factory=Fractions)
    seed: int = 0
    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=lambda: Limits(samples=5000, bytes=128 << 20))
    max_bad: float = 0.01
    workers: int = 1

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "workers"}


@dataclass(frozen=True)
class Outcome:
    """What was done. `made` is False where the same set was there already."""

    manifest: Manifest
    made: bool
    seconds: float
    warnings: tuple[str, ...] = ()


def build(
    source: Source, output: Path, settings: Settings, report: Report | None = None, overwrite: bool = False
) -> Outcome:
    """Make the data set of `source` in `output`. Raises UserError or DataError with nothing of it left behind."""
    start = time.monotonic()
    identity = _identity(source, settings)
    found = existing(output)
    if found is not None and not overwrite:
        if found.source.get("identity") == identity:
            return Outcome(found, False, time.monotonic() - start)
        raise UserError(f"{output} holds another data set ({found.name!r}): give another --output, or --overwrite True")
    splits = assign(source, settings)
    with Staging(output) as staging:
        try:
            manifest = _write(source, splits, settings, staging.folder, report or (lambda *_: None), identity)
            staging.publish(manifest)
        except OSError as error:
            raise UserError(f"cannot write to {output}: {error.strerror or error}; nothing was kept") from error
    return Outcome(manifest, True, time.monotonic() - start, source.warnings)


def assign(source: Source, settings: Settings) -> dict[str, NDArray[np.int64]]:
    """The ids of each split: as the source gives them; what it leaves open is split by the settings' fractions."""
    out = {name: np.flatnonzero(source.split_of == at) for at, name in enumerate(source.split_names)}
    free = np.flatnonzero(source.split_of == -1)
    if len(free):
        cut = stratified(
            source.labels[free], settings.fractions, settings.seed, source.classes, source.names.__getitem__
        )
        out |= {name: free[ids] for name, ids in cut.items()}
    return {name: out[name] for name in ("train", "val", "test") if name in out and len(out[name])}


def make_keys(source: Source) -> list[str]:
    """A key for each image: its name without extension, safe in a tar and for webdataset (no dots), never twice."""
    if not source.named:
        return list(source.names)
    taken: set[str] = set()
    keys = []
    for number, name in enumerate(source.names):
        stem = name.rsplit(".", 1)[0] if "." in name.rsplit("/", 1)[-1] else name
        key = re.sub(r"[^A-Za-z0-9_/+=@,-]", "_", stem).strip("/")
        if not key or len(key) > MAX_KEY or key in taken:
            key = f"{key[: MAX_KEY - 11].rstrip('/')}-{number:010d}"
        taken.add(key)
        keys.append(key)
    return keys


def _write(
    source: Source,
    splits: dict[str, NDArray[np.int64]],
    settings: Settings,
    folder: Path,
    report: Report,
    identity: str,
) -> Manifest:
    keys = make_keys(source)
    sums, bad, done = Sums(), [], {}
    with _executor(settings.workers, len(source)) as executor:
        for number, (name, ids) in enumerate(splits.items()):
            order = ids[permutation(len(ids), settings.seed, SHUFFLE, number)]
            tasks = _tasks(source, order, keys)
            writer = ShardWriter(folder, name, settings.limits)
            counts = np.zeros(len(source.classes), dtype=np.int64)
            seen = 0
            try:
                for task, part in _in_order(executor, tasks, settings, name == "train"):
                    writer.add(part)
                    sums.merge(part.sums)
                    counts += np.bincount(part.rows["label"][part.rows["label"] >= 0], minlength=len(counts))
                    bad += [Quarantined(source.names[task[place]], reason, name) for place, reason in part.bad]
                    _check_bad(bad, len(source), settings.max_bad)
                    seen += len(task)
                    report(name, seen, len(order))
                done[name] = Split(writer.finish(), tuple(counts.tolist()) if counts.any() else ())
            finally:
                writer.abandon()
    return Manifest(
        name=source.name,
        classes=source.classes,
        splits=done,
        image=sums.stats(),
        quarantined=tuple(sorted(bad, key=lambda row: (row.split, row.name))),
        source={"kind": source.kind, **source.facts, "settings": settings.facts(), "identity": identity},
    )


def _tasks(source: Source, order: NDArray[np.int64], keys: list[str]) -> Iterator[tuple[list[int], list[Item]]]:
    """The images of a split in runs of at most TASK_SAMPLES and about TASK_BYTES."""
    ids: list[int] = []
    size = 0
    for i in order.tolist():
        ids.append(i)
        size += int(source.sizes[i])
        if len(ids) == TASK_SAMPLES or size >= TASK_BYTES:
            yield ids, _items(source, ids, keys)
            ids, size = [], 0
    if ids:
        yield ids, _items(source, ids, keys)


def _items(source: Source, ids: list[int], keys: list[str]) -> list[Item]:
    labels = source.labels[ids].tolist()
    return [
        Item(keys[i], source.names[i] if source.named else "", label, source.payload(i))
        for i, label in zip(ids, labels, strict=True)
    ]


def _executor(workers: int, images: int) -> Any:
    import contextlib

    if workers <= 1 or images < FEW:
        return contextlib.nullcontext(None)
    return ProcessPoolExecutor(workers)


def _in_order(
    executor: Executor | None,
    tasks: Iterator[tuple[list[int], list[Item]]],
    settings: Settings,
    count: bool,
) -> Iterator[tuple[list[int], Part]]:
    """(ids, part) of each task in the order of the tasks, with a bounded number under way."""
    if executor is None:
        for ids, items in tasks:
            yield ids, pack(items, settings.policy, count)
        return
    waiting: deque[tuple[list[int], Future[Part]]] = deque()
    for ids, items in tasks:
        waiting.append((ids, executor.submit(pack, items, settings.policy, count)))
        if len(waiting) > 2 * settings.workers:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _check_bad(bad: list[Quarantined], total: int, limit: float) -> None:
    allowed = max(10, int(limit * total)) if limit < 1 else int(limit)
    if len(bad) > allowed:
        last = bad[-1]
        raise DataError(
            f"{len(bad)} images cannot be used, more than {allowed} of {total} (the last: {last.name}: {last.reason});"
            " mend them, or allow more with --max-bad"
        )


def _identity(source: Source, settings: Settings) -> str:
    """sha256 (hex) of all that decides what comes out: the source's digest and the settings."""
    facts = [PREPARE_VERSION, source.kind, source.name, source.classes, source.digest, settings.facts()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
