"""Images in folders: a folder a class, or train/, val/ and test/ with a folder a class in each."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distcnn.data.prepare.source import Source
from distcnn.errors import DataError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Found:
    """Image files below a folder: paths relative to it with '/', sorted; bytes; times of change in ns."""

    paths: list[str]
    sizes: list[int]
    times: list[int]


def from_folder(folder: Path) -> Source:
    """The images below `folder`, whose class is the first folder under it (or under train/, val/, test/).

    Names of classes are sorted, by value where all are integers. Hidden files and folders are passed over, and files
    with another extension than an image's. Raises DataError for what cannot be a set of classes.
    """
    found = find_images(folder)
    if not found.paths:
        raise DataError(
            f"{folder} holds no image ({', '.join(sorted(EXTENSIONS))}): give a folder with a folder per class"
        )
    tops = {path.split("/", 1)[0] for path in found.paths}
    given = all(top.lower() in SPLIT_FOLDERS for top in tops) and any(SPLIT_FOLDERS[t.lower()] == "train" for t in tops)
    depth = 1 if given else 0
    parts = [path.split("/", depth + 1) for path in found.paths]
    for path, words in zip(found.paths, parts, strict=True):
        if len(words) < depth + 2:
            raise DataError(
                f"{folder / path} lies in no class folder: put each image in a folder named after its class,"
                " or use 'distcnn prepare csv' where a table says the classes"
            )
    classes = order_classes({words[depth] for words in parts})
    if len(classes) < 2:
        raise DataError(f"{folder} has 1 class ({classes[0]!r}): a classifier needs at least 2 class folders")
    label_of = {name: label for label, name in enumerate(classes)}
    splits = [SPLIT_FOLDERS[words[0].lower()] if given else "" for words in parts]
    split_names = tuple(name for name in ("train", "val", "test") if name in splits)
    place = {name: at for at, name in enumerate(split_names)} | {"": -1}
    root = str(folder)
    return Source(
        kind="folder",
        name=folder.resolve().name,
        classes=classes,
        names=found.paths,
        labels=np.array([label_of[words[depth]] for words in parts], dtype=np.int64),
        payload=lambda i: f"{root}/{found.paths[i]}",
        sizes=np.array(found.sizes, dtype=np.int64),
        digest=digest_files(found),
        split_names=split_names,
        split_of=np.array([place[name] for name in splits], dtype=np.int64),
        facts={"folder": folder.name},
    )


def find_images(folder: Path) -> Found:
    """All image files below `folder`, at any depth, by extension in any case. Raises DataError if it is no folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    rows: list[tuple[str, int, int]] = []
    try:
        _walk(str(folder), "", rows)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    rows.sort()
    return Found([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def _walk(folder: str, prefix: str, rows: list[tuple[str, int, int]]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                _walk(entry.path, f"{prefix}{name}/", rows)
            elif os.path.splitext(name)[1].lower() in EXTENSIONS:  # noqa: PTH122 - 60,000 Path objects take 0.3 s
                facts = entry.stat()
                rows.append((prefix + name, facts.st_size, facts.st_mtime_ns))


def order_classes(names: set[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: by value if all are integers ('2' before '10'), else as text."""
    if all(name.isdecimal() and name.isascii() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def digest_files(found: Found) -> str:
    """sha256 (hex) over names, sizes and times: what make and rsync take for the identity of files."""
    lines = "\n".join(
        f"{path}\0{size}\0{time}" for path, size, time in zip(found.paths, found.sizes, found.times, strict=True)
    )
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
