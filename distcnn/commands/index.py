"""Make a data set of shards that others wrote: their headers are read, dataset.json and indexes are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from distcnn.data.manifest import Manifest


@dataclass(frozen=True)
class Options:
    """Shards as PATTERN or SPLIT=PATTERN, for example train='/x/train-{0000..0123}.tar' val='/x/val-*.tar'."""

    patterns: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SPLIT=]PATTERN ...")]
    """Paths or URLs with {0000..0123}, {a,b}, * and ?; several joined by ::. s3:// and the like need distcnn[remote]"""
    output: Path
    """The dataset.json to write, or its folder. The shards stay where they are"""
    split: str = "train"
    """The split of patterns given without SPLIT="""
    label: str = "cls"
    """Where labels come from: cls, folder (of the key), none, or a key of the .json members (a.b for nested ones)"""
    classes: Path | None = None
    """Class names in the order of the labels: a text file with a line each, or a JSON list"""
    unlabelled: tuple[str, ...] = ()
    """Splits whose samples have no labels"""
    verify: bool = False
    """Decode every image: quarantine the bad ones; fill in sizes, mean, std and checksums"""
    wds2idx: bool = False
    """Take the offsets from the .idx (v1.2, by wds2idx) beside each shard, not from its headers"""
    skip_bad_shards: bool = False
    """Quarantine shards that are missing, cut off or no tars, instead of stopping"""
    name: str = ""
    """Name of the data set (default: the name of its folder)"""
    overwrite: bool = False
    """Replace the dataset.json that is there"""
    workers: int = 0
    """Processes; 0 = one a core"""


def run(options: Options) -> int:
    """Index; print what was found."""
    import time

    from distcnn.console import Console
    from distcnn.data.index import IndexRequest, index_data_set, with_rules
    from distcnn.data.labels import parse_rule, read_classes

    begun = time.monotonic()
    request = IndexRequest(
        root=root_of(options.output),
        shards=shards_by_split(options.patterns, options.split),
        rule=parse_rule(options.label),
        classes=read_classes(options.classes) if options.classes else (),
        name=options.name,
        verify=options.verify,
        wds2idx=options.wds2idx,
        skip_bad_shards=options.skip_bad_shards,
        overwrite=options.overwrite,
        workers=options.workers,
    )
    manifest = index_data_set(with_rules(request, options.unlabelled), Console(speaks=True))
    _report(manifest, request.root, time.monotonic() - begun, options.verify)
    return 0


def root_of(output: Path) -> Path:
    """The folder that holds dataset.json, absolute. Raises UserError for another file name."""
    from distcnn.data.manifest import MANIFEST_NAME
    from distcnn.errors import UserError

    if output.suffix == ".json":
        if output.name != MANIFEST_NAME:
            raise UserError(f"--output {output}: the file is called {MANIFEST_NAME}; give its folder")
        output = output.parent
    return output.expanduser().absolute()


def shards_by_split(patterns: tuple[str, ...], default: str) -> dict[str, list[str]]:
    """The shards of each split, from words PATTERN and SPLIT=PATTERN. Raises UserError or DataError."""
    import re

    from distcnn.data.sources import expand, refuse_repeated
    from distcnn.errors import UserError

    if not patterns:
        raise UserError("name the shards: PATTERN or SPLIT=PATTERN, for example train='/x/train-{0000..0123}.tar'")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", default):
        raise UserError(f"--split {default!r}: letters, digits, _ and - only")
    shards: dict[str, list[str]] = {}
    for word in patterns:
        named = re.match(r"([A-Za-z][A-Za-z0-9_-]*)=", word)
        split = named.group(1) if named else default
        shards.setdefault(split, []).extend(expand(word[named.end() :] if named else word))
    refuse_repeated([name for names in shards.values() for name in names])
    return shards


def _report(manifest: Manifest, root: Path, seconds: float, verified: bool) -> None:
    for name, split in manifest.splits.items():
        empty = [manifest.classes[label] for label, count in enumerate(split.class_counts) if not count]
        kind = f"{len(split.class_counts)} classes" if split.labelled else "no labels"
        none_in = f", none in {', '.join(map(repr, empty[:5]))}" + (" ..." if len(empty) > 5 else "") if empty else ""
        print(f"{name:<6} {split.samples:>9,} images in {len(split.shards)} shards, {kind}{none_in}")
    if manifest.quarantined:
        print(f"{len(manifest.quarantined)} left out, for example:")
        for row in manifest.quarantined[:5]:
            print(f"  {row.name!r}: {row.reason}")
    if not verified:
        print("not decoded: sizes, mean and std are unknown (--verify finds them, and bad images)")
    print(f"{root}/dataset.json written in {seconds:.1f} s; next: distcnn inspect {root}")
