"""Shards that others wrote to a data set: found, read by their headers, labelled, verified on request, written down.

Nothing is written before every shard has been read; dataset.json comes last. The tars are never changed or moved: a
shard keeps its path relative to dataset.json where it lies below it, else its absolute path or URL.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from distcnn.console import Console
from distcnn.data.decode import MAX_BYTES
from distcnn.data.labels import LabelRule, check_label
from distcnn.data.manifest import (
    MANIFEST_NAME,
    UNLABELLED,
    ImageStats,
    Manifest,
    Quarantined,
    Shard,
    Split,
    load_manifest,
    save_manifest,
)
from distcnn.data.parallel import SILENT, run_jobs
from distcnn.data.prepare.pool import usable_cores
from distcnn.data.prepare.stats import Sums
from distcnn.data.shards import MAX_SMALL_BYTES, IndexRows, index_dtype, make_index, samples_from, split_name
from distcnn.data.sources import is_remote, open_shard
from distcnn.data.sweep import Verified, cut, rows_digest, verify
from distcnn.data.tar import Member, ReadAt, members_from
from distcnn.data.wds2idx import members_by_index
from distcnn.errors import DataError, UserError
from distcnn.files import sync_folder, write_atomically

INDEX_FOLDER = "index"
SHARDS_A_PROCESS = 8  # to start a process takes as long as to read the headers of some shards,
BYTES_FOR_PROCESSES = 8 << 20  # or to decode some megabytes


@dataclass(frozen=True)
class IndexRequest:
    """What to index: shards by split (absolute paths or URLs), and how.

    `rules` has a rule for splits that differ from `rule`; `classes` () = found in the shards. With `skip_bad_shards`
    a shard that cannot be read is quarantined whole instead of ending the work.
    """

    root: Path
    shards: dict[str, list[str]]
    rule: LabelRule = field(default_factory=LabelRule)
    rules: dict[str, LabelRule] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    name: str = ""
    verify: bool = False
    wds2idx: bool = False
    skip_bad_shards: bool = False
    overwrite: bool = False
    workers: int = 0


@dataclass
class FoundShard:
    """What the headers of a shard say. The labels in `rows` are places in `names` where that is not empty.

    `bad` are (member or key, why) of samples left out; `error` says why the whole shard cannot be used.
    """

    split: str
    path: str
    bytes: int = 0
    rows: IndexRows = field(default_factory=lambda: np.empty(0, index_dtype(1)))
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    sha256: str = ""
    error: str = ""


@dataclass(frozen=True)
class _Job:
    split: str
    path: str
    rule: LabelRule
    classes: tuple[str, ...]
    wds2idx: bool


def index_data_set(request: IndexRequest, console: Console = SILENT) -> Manifest:
    """Index the shards and write dataset.json with its indexes. Raises UserError or DataError before it writes."""
    previous = _check_output(request)
    jobs = [
        _Job(split, path, request.rules.get(split, request.rule), request.classes, request.wds2idx)
        for split, paths in request.shards.items()
        for path in paths
    ]
    workers = request.workers or min(usable_cores(), -(-len(jobs) // SHARDS_A_PROCESS))
    if any(job.path.startswith("memory://") for job in jobs):
        workers = 1  # such shards are in this process only
    found = _settle(run_jobs(index_shard, jobs, "shards", workers=workers, console=console), request)
    classes = _settle_classes(found, request)
    if request.verify:
        _verify(found, request.workers, console)
    for split in request.shards:
        _refuse_empty(split, [shard for shard in found if shard.split == split])
    return _write(found, classes, request, previous)


def index_shard(job: _Job) -> FoundShard:
    """Read the headers and labels of one shard. A DataError comes back as the `error` of the result."""
    found = FoundShard(job.split, job.path)
    try:
        with open_shard(job.path) as (read, total):
            found.bytes = total
            members = members_by_index(job.path, read, total) if job.wds2idx else members_from(read, total, job.path)
            _read_samples(found, members, read, job)
    except DataError as error:
        found.error = str(error)
    return found


def _read_samples(found: FoundShard, members: Iterable[Member], read: ReadAt, job: _Job) -> None:
    rows: list[tuple[int, int, int, int, int, str]] = []
    texts: dict[int, bytes] = {}
    places: dict[str, int] = {}
    known = set(job.classes)
    kind: type | None = None
    for sample in samples_from(_with_texts(members, job.rule.member, read, texts), job.path):
        image, source = sample.image, sample.members.get(job.rule.member)
        text = texts.pop(source.offset) if source else b""
        if image is None:
            found.bad.append((sample.key, "no image beside its " + ", ".join("." + name for name in sample.members)))
            continue
        if not 0 < image.size <= MAX_BYTES:
            found.bad.append((image.name, f"{image.size} bytes"))
            continue
        label = job.rule.label(sample, text, job.path)
        number = UNLABELLED
        if label is not None:
            if label not in known:
                check_label(label, job.classes, sample.key, job.path)
            if kind is not None and type(label) is not kind:
                raise DataError(
                    f"shard {job.path}: key {sample.key!r} has the label {label!r}: numbers and names mixed"
                )
            kind = type(label)
            number = places.setdefault(label, len(places)) if isinstance(label, str) else label
        rows.append((image.offset, image.size, number, 0, 0, sample.key))
    found.rows, found.names = make_index(rows), list(places)


def _with_texts(members: Iterable[Member], extension: str, read: ReadAt, texts: dict[int, bytes]) -> Iterator[Member]:
    """The members; those that hold labels are read while their block is at hand, into `texts` by offset."""
    for member in members:
        if extension and split_name(member.name)[1] == extension:
            texts[member.offset] = read(member.offset, min(member.size, MAX_SMALL_BYTES + 1))
        yield member


def _check_output(request: IndexRequest) -> Manifest | None:
    """The data set that is there already and may be replaced. Raises UserError if it may not."""
    path = request.root / MANIFEST_NAME
    if not path.exists():
        return None
    if not request.overwrite:
        raise UserError(f"{path} exists: give another --output, or --overwrite to replace it (tars are never touched)")
    try:
        return load_manifest(path)
    except DataError:
        return None


def _settle(found: list[FoundShard], request: IndexRequest) -> list[FoundShard]:
    """Raises DataError for shards that cannot be used, unless they are to be skipped."""
    broken = [shard for shard in found if shard.error]
    if broken and not request.skip_bad_shards:
        more = f" (and {len(broken) - 1} more shards; --skip-bad-shards leaves such out)" if len(broken) > 1 else ""
        raise DataError(broken[0].error + more)
    return found


def _refuse_empty(split: str, found: list[FoundShard]) -> None:
    if not any(len(shard.rows) for shard in found):
        reasons = [shard.error for shard in found if shard.error]
        reasons += [f"{shard.path}: {name!r}: {reason}" for shard in found for name, reason in shard.bad[:1]]
        first = f" (first: {reasons[0]})" if reasons else ""
        raise DataError(f"split {split!r} has no usable sample in its {len(found)} shards{first}")


def _settle_classes(found: list[FoundShard], request: IndexRequest) -> tuple[str, ...]:
    """The class names; the labels of all shards become places in them."""
    good = [shard for shard in found if not shard.error]
    labelled = [shard for shard in good if len(shard.rows) and shard.rows["label"][0] != UNLABELLED]
    named = [shard for shard in labelled if shard.names]
    if named and len(named) < len(labelled):
        other = next(shard for shard in labelled if not shard.names)
        raise DataError(f"labels are names in shard {named[0].path} and numbers in shard {other.path}")
    classes = request.classes
    if named:
        classes = classes or tuple(sorted({name for shard in named for name in shard.names}))
        place = {name: number for number, name in enumerate(classes)}
        for shard in named:
            table = np.array([place[name] for name in shard.names], dtype=np.int32)
            shard.rows["label"] = table[shard.rows["label"]]
    elif not classes:
        top = max((int(shard.rows["label"].max()) for shard in labelled), default=UNLABELLED)
        classes = tuple(str(number) for number in range(top + 1))
    return classes


def _verify(found: list[FoundShard], workers: int, console: Console) -> None:
    """Decode everything: sizes into the rows, bad images out of them, sums and checksums beside them."""
    chunks = [chunk for number, shard in enumerate(found) for chunk in cut(shard.split, number, shard.path, shard.rows)]
    if sum(int(chunk.rows["size"].sum()) for chunk in chunks) < BYTES_FOR_PROCESSES:
        workers = 1
    results = run_jobs(verify, chunks, "images", [len(chunk.rows) for chunk in chunks], workers, console)
    by_shard: dict[int, list[Verified]] = {}
    for chunk, result in zip(chunks, results, strict=True):
        by_shard.setdefault(chunk.shard, []).append(result)
        found[chunk.shard].bad.extend((chunk.key(place), reason) for place, reason in result.bad)
    for number, parts in by_shard.items():
        shard = found[number]
        sizes = [size for part in parts for size in part.sizes]
        keep = np.array([size is not None for size in sizes])
        shard.rows["width"] = [size[0] if size else 0 for size in sizes]
        shard.rows["height"] = [size[1] if size else 0 for size in sizes]
        shard.rows, shard.sha256 = shard.rows[keep], parts[0].sha256
        for part in parts:
            shard.sums.merge(part.sums)


def _write(
    found: list[FoundShard], classes: tuple[str, ...], request: IndexRequest, previous: Manifest | None
) -> Manifest:
    """The indexes, then dataset.json, then away with the indexes of the set that it replaces."""
    folder = request.root / INDEX_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        splits: dict[str, list[Shard]] = {split: [] for split in request.shards}
        for shard in found:
            if len(shard.rows):
                splits[shard.split].append(_write_index(shard, request.root, len(splits[shard.split])))
        sync_folder(request.root)
        manifest = Manifest(
            name=request.name or request.root.name,
            classes=classes,
            splits={name: Split(tuple(shards), _counts(found, name, classes)) for name, shards in splits.items()},
            image=_image_stats(found),
            quarantined=tuple(_quarantined(found, request.root)),
            source={"kind": "index", "label": request.rule.source, "verified": request.verify},
        )
        save_manifest(manifest, request.root)
    except OSError as error:
        raise UserError(f"cannot write to {request.root}: {error.strerror or error}") from error
    if previous is not None:
        _remove_indexes(request.root, previous, keep=manifest)
    return manifest


def _write_index(shard: FoundShard, root: Path, number: int) -> Shard:
    name = f"{INDEX_FOLDER}/{shard.split}-{number:06d}-{rows_digest(shard.rows)}.npy"
    buffer = io.BytesIO()
    np.save(buffer, shard.rows, allow_pickle=False)
    write_atomically(root / name, buffer.getvalue())
    return Shard(_relative(shard.path, root), name, len(shard.rows), shard.bytes, shard.sha256)


def _remove_indexes(root: Path, previous: Manifest, keep: Manifest) -> None:
    kept = {shard.index for split in keep.splits.values() for shard in split.shards}
    for split in previous.splits.values():
        for shard in split.shards:
            if shard.index not in kept and shard.index.startswith(f"{INDEX_FOLDER}/") and ".." not in shard.index:
                (root / shard.index).unlink(missing_ok=True)


def _relative(path: str, root: Path) -> str:
    if not is_remote(path) and Path(path).is_relative_to(root):
        return str(Path(path).relative_to(root))
    return path


def _counts(found: list[FoundShard], split: str, classes: tuple[str, ...]) -> tuple[int, ...]:
    """(K,) samples of each class in a split, () where it has no labels."""
    counts = np.zeros(len(classes), dtype=np.int64)
    for shard in found:
        if shard.split == split and len(shard.rows):
            if shard.rows["label"][0] == UNLABELLED:
                return ()
            counts += np.bincount(shard.rows["label"], minlength=len(classes))
    return tuple(counts.tolist())


def _image_stats(found: list[FoundShard]) -> ImageStats:
    """Of the train split, or of the only one there is."""
    sums = Sums()
    chosen = [shard for shard in found if shard.split == "train"] or found
    for shard in chosen:
        sums.merge(shard.sums)
    return sums.stats()


def _quarantined(found: list[FoundShard], root: Path) -> Iterator[Quarantined]:
    for shard in found:
        name = _relative(shard.path, root)
        if shard.error:
            yield Quarantined(name, shard.error, shard.split)
        for member, reason in shard.bad:
            yield Quarantined(f"{name}/{member}", reason, shard.split)


def with_rules(request: IndexRequest, unlabelled: Iterable[str]) -> IndexRequest:
    """`request` with the splits named in `unlabelled` read without labels. Raises UserError for one it lacks."""
    names = list(unlabelled)
    for name in names:
        if name not in request.shards:
            raise UserError(f"--unlabelled {name}: there is no such split; there are {', '.join(request.shards)}")
    return replace(request, rules={**request.rules, **{name: LabelRule("none") for name in names}})
