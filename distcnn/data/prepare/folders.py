"""Images in folders: a folder a class, or train/, val/ and test/ with a folder a class in each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distcnn.data.prepare.pool import Pool
from distcnn.data.prepare.source import FREE, SPLITS, Ids, Source, digest_of, order_classes, printable
from distcnn.errors import DataError

EXTENSIONS = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"))
MANY = 2000  # images, after which processes are worth their start
SPLIT_FOLDERS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}


@dataclass(frozen=True)
class Found:
    """Image files below a folder: paths relative to it with '/'; bytes (n,) int64; times of change (n,) int64 ns.

    `folders`: for each folder that holds some, in the order of the paths: the names that lead to it, and how many.
    """

    paths: list[str]
    sizes: Ids
    times: Ids
    folders: list[tuple[tuple[str, ...], int]]


def from_folder(folder: Path, pool: Pool | None = None) -> Source:
    """The images below `folder`, whose class is the first folder under it (or under train/, val/ and test/).

    Names of classes are sorted, by value where all are integers. Hidden files and folders are passed over, and files
    with another extension than an image's. Raises DataError for what cannot be a set of classes.
    """
    found = find_images(folder, pool)
    if not found.paths:
        known = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{folder} holds no image ({known}): give a folder that has a folder for each class")
    given = _splits_given({names[0] if names else "" for names, _ in found.folders})
    depth = 1 if given else 0
    first = 0
    for names, images in found.folders:
        if len(names) <= depth:
            raise DataError(
                f"{folder / printable(found.paths[first])} lies in no class folder: put each image into a folder named"
                " after its class, or use 'distcnn prepare csv' where a table says the classes"
            )
        first += images
    present = {names[depth]: printable(names[depth]) for names, _ in found.folders}
    classes = order_classes(set(present.values()))
    if len(classes) < 2:
        raise DataError(f"{folder} has 1 class ({classes[0]!r}): a classifier needs at least 2 class folders")
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[present[names[depth]]] for names, _ in found.folders], dtype=np.int64)
    splits = np.array(
        [SPLIT_FOLDERS[names[0].lower()] if given else FREE for names, _ in found.folders], dtype=np.int64
    )
    counts = np.array([images for _, images in found.folders])
    return Source(
        kind="folder",
        name=folder.resolve().name,
        classes=classes,
        names=found.paths if "".join(found.paths).isascii() else [printable(path) for path in found.paths],
        labels=np.repeat(labels, counts),
        payload=found.paths.__getitem__,
        root=str(folder.resolve()),
        sizes=found.sizes,
        digest=digest_of(found.paths, found.sizes, found.times),
        split_of=np.repeat(splits, counts),
        warnings=_classes_missing(classes, labels, splits) if given else (),
    )


def _splits_given(tops: set[str]) -> bool:
    """Whether the top folders are train/ and others of the splits, and nothing else."""
    places = [SPLIT_FOLDERS.get(top.lower()) for top in tops]
    return 0 in places and None not in places


def _classes_missing(classes: tuple[str, ...], labels: Ids, splits: Ids) -> tuple[str, ...]:
    """A line for each split that lacks some of the classes, from (n,) labels and splits of folders."""
    lines = []
    for split in np.unique(splits).tolist():
        held = set(labels[splits == split].tolist())
        missing = [name for label, name in enumerate(classes) if label not in held]
        if missing:
            some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            lines.append(f"{SPLITS[split]} has no image of {len(missing)} of the {len(classes)} classes: {some}")
    return tuple(lines)


def find_images(folder: Path, pool: Pool | None = None) -> Found:
    """All image files below `folder`, at any depth, by extension in any case; sorted within each folder.

    With a `pool`, and once there are many, its processes go through the folders of a folder side by side. Raises
    DataError if `folder` is none or cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    try:
        parts = _walk(_Place(str(folder), (), (os.path.realpath(folder),)), pool or Pool(1))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    paths = [path for part in parts for path in part.paths]
    sizes, times = (np.concatenate([getattr(part, column) for part in parts]) for column in ("sizes", "times"))
    return Found(paths, sizes, times, [folder for part in parts for folder in part.folders])


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder to be listed, the names that lead to it, and the real paths of the folders above and of itself."""

    path: str
    names: tuple[str, ...]
    above: tuple[str, ...]


def _walk(top: _Place, pool: Pool) -> list[Found]:
    """The images of a folder, then of each folder in it, in the order of their names; listed level by level."""
    parts: dict[tuple[str, ...], Found] = {}
    level = [top]
    images = 0
    while level:
        alone = 0
        below: list[_Place] = []
        while alone < len(level) and (pool.workers == 1 or images < MANY):
            parts[level[alone].names], inner = _list(level[alone])
            images += len(parts[level[alone].names].paths)
            below += inner
            alone += 1
        for place, (found, inner) in pool.map(_list, ((place, (place,)) for place in level[alone:])):
            parts[place.names] = found
            below += inner
        level = below
    return [parts[names] for names in sorted(parts)]


def _list(place: _Place) -> tuple[Found, list[_Place]]:
    """The images of one folder, and the folders in it. A link to a folder above is passed over: it has no end."""
    folders = []
    files = []
    prefix = "".join(f"{name}/" for name in place.names)
    with os.scandir(place.path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if name.rpartition(".")[2].lower() in EXTENSIONS and entry.is_file():
                facts = entry.stat()
                files.append((prefix + name, facts.st_size, facts.st_mtime_ns))
            elif entry.is_dir():
                folders.append(name)
    files.sort()
    paths, sizes, times = zip(*files, strict=True) if files else ((), (), ())
    inner = []
    for name in sorted(folders):
        path = f"{place.path}/{name}"
        real = os.path.realpath(path)
        if real not in place.above:
            inner.append(_Place(path, (*place.names, name), (*place.above, real)))
    columns = [np.array(column, dtype=np.int64) for column in (sizes, times)]
    return Found(list(paths), columns[0], columns[1], [(place.names, len(paths))] if files else []), inner
