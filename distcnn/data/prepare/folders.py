"""Images in folders: a folder a class, or train/, val/ and test/ with a folder a class in each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distcnn.data.prepare.source import FREE, SPLITS, Ids, Source, digest_of, order_classes, printable
from distcnn.errors import DataError

EXTENSIONS = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"))
SPLIT_FOLDERS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}


@dataclass(frozen=True)
class Found:
    """Image files below a folder: paths relative to it with '/'; bytes (n,) int64; times of change (n,) int64 ns."""

    paths: list[str]
    sizes: Ids
    times: Ids


def from_folder(folder: Path) -> Source:
    """The images below `folder`, whose class is the first folder under it (or under train/, val/ and test/).

    Names of classes are sorted, by value where all are integers. Hidden files and folders are passed over, and files
    with another extension than an image's. Raises DataError for what cannot be a set of classes.
    """
    found = find_images(folder)
    if not found.paths:
        known = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{folder} holds no image ({known}): give a folder that has a folder for each class")
    given = _splits_given({path.split("/", 1)[0] for path in found.paths})
    depth = 1 if given else 0
    heads = [path.split("/", depth + 1)[: depth + 2] for path in found.paths]
    for path, head in zip(found.paths, heads, strict=True):
        if len(head) < depth + 2:
            raise DataError(
                f"{folder / printable(path)} lies in no class folder: put each image into a folder named after its"
                " class, or use 'distcnn prepare csv' where a table says the classes"
            )
    names = [head[depth] for head in heads]
    present = {name: printable(name) for name in set(names)}
    classes = order_classes(set(present.values()))
    if len(classes) < 2:
        raise DataError(f"{folder} has 1 class ({classes[0]!r}): a classifier needs at least 2 class folders")
    label_of = {name: classes.index(shown) for name, shown in present.items()}
    split_of = [SPLIT_FOLDERS[head[0].lower()] if given else FREE for head in heads]
    return Source(
        kind="folder",
        name=folder.resolve().name,
        classes=classes,
        names=[printable(path) for path in found.paths],
        labels=np.array([label_of[name] for name in names], dtype=np.int64),
        payload=found.paths.__getitem__,
        root=str(folder.resolve()),
        sizes=found.sizes,
        digest=digest_of(found.paths, found.sizes, found.times),
        split_of=np.array(split_of, dtype=np.int64),
        warnings=_classes_missing(classes, label_of, names, split_of) if given else (),
    )


def _splits_given(tops: set[str]) -> bool:
    """Whether the top folders are train/ and others of the splits, and nothing else."""
    places = [SPLIT_FOLDERS.get(top.lower()) for top in tops]
    return 0 in places and None not in places


def _classes_missing(
    classes: tuple[str, ...], label_of: dict[str, int], names: list[str], split_of: list[int]
) -> tuple[str, ...]:
    """A line for each split that lacks some of the classes."""
    held: dict[int, set[int]] = {}
    for name, split in zip(names, split_of, strict=True):
        held.setdefault(split, set()).add(label_of[name])
    lines = []
    for split, labels in sorted(held.items()):
        missing = [name for label, name in enumerate(classes) if label not in labels]
        if missing:
            some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            lines.append(f"{SPLITS[split]} has no image of {len(missing)} of the {len(classes)} classes: {some}")
    return tuple(lines)


def find_images(folder: Path) -> Found:
    """All image files below `folder`, at any depth, by extension in any case; sorted within each folder.

    Raises DataError if `folder` is none or cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    rows: list[tuple[str, int, int]] = []
    try:
        _walk(str(folder), "", rows, (os.path.realpath(folder),))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    paths, sizes, times = zip(*rows, strict=True) if rows else ((), (), ())
    return Found(list(paths), np.array(sizes, dtype=np.int64), np.array(times, dtype=np.int64))


def _walk(folder: str, prefix: str, rows: list[tuple[str, int, int]], above: tuple[str, ...]) -> None:
    """Images of a folder, then of the folders in it. A link to a folder above is passed over: it has no end."""
    folders = []
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if name.rpartition(".")[2].lower() in EXTENSIONS and entry.is_file():
                facts = entry.stat()
                files.append((prefix + name, facts.st_size, facts.st_mtime_ns))
            elif entry.is_dir():
                folders.append(name)
    rows += sorted(files)
    for name in sorted(folders):
        real = os.path.realpath(f"{folder}/{name}")
        if real not in above:
            _walk(f"{folder}/{name}", f"{prefix}{name}/", rows, (*above, real))
