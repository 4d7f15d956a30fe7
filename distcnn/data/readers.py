"""Images to predict, wherever they lie: files, folders, tables, shards; all behind the reader's few methods."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distcnn.data.manifest import MANIFEST_NAME, UNLABELLED, load_manifest
from distcnn.data.order import Ids
from distcnn.data.shards import COLUMNS, Found, SplitReader, samples_in
from distcnn.errors import DataError, UserError, nearest

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


class Reader(Protocol):
    """What a Loader asks of its images: see data/shards.py, SplitReader."""

    counts: NDArray[np.int64]  # (S,) samples of each shard

    def __len__(self) -> int: ...
    def find(self, ids: Ids) -> Found: ...
    def read(self, ids: Ids, found: Found | None = None) -> list[bytes]: ...
    def labels(self, ids: Ids) -> NDArray[np.int64]: ...
    def keys(self, ids: Ids) -> list[tuple[str, str]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Piece:
    """Where the bytes of an image lie: a whole file, or `size` bytes at `offset` of one."""

    path: Path
    offset: int = 0
    size: int = -1


class FileReader:
    """Images in files, by their place in a list. `names` are what they are called in results."""

    def __init__(self, files: Sequence[Path | Piece], names: Sequence[str] | None = None) -> None:
        self._pieces = [file if isinstance(file, Piece) else Piece(file) for file in files]
        self.counts = np.array([len(self._pieces)], dtype=np.int64)
        self._names = [str(piece.path) for piece in self._pieces] if names is None else list(names)

    def __len__(self) -> int:
        return len(self._pieces)

    def find(self, ids: Ids) -> Found:
        """No shards, no labels, sizes not known: what a file is shows when it is read."""
        columns = np.zeros(len(ids), dtype=COLUMNS)
        columns["label"] = UNLABELLED
        return Found(np.zeros(len(ids), dtype=np.int64), columns)

    def read(self, ids: Ids, found: Found | None = None) -> list[bytes]:
        """The bytes of images. Raises DataError naming a file that cannot be read."""
        contents = []
        for number in ids.tolist():
            piece = self._pieces[number]
            try:
                with piece.path.open("rb") as file:
                    file.seek(piece.offset)
                    contents.append(file.read(piece.size))
            except OSError as error:
                raise DataError(f"cannot read {piece.path}: {error.strerror or error}") from error
        return contents

    def labels(self, ids: Ids) -> NDArray[np.int64]:
        """(n,) of -1: nothing is known of them."""
        return np.full(len(ids), UNLABELLED, dtype=np.int64)

    def keys(self, ids: Ids) -> list[tuple[str, str]]:
        """("", name) of each."""
        return [("", self._names[number]) for number in ids.tolist()]

    def close(self) -> None:
        """Nothing is kept open."""


def open_images(inputs: Sequence[str], images: Path | None, image_column: str, split: str) -> Reader:
    """A Reader of what a user names: image files and folders, tar shards, one CSV or TSV, or one data set folder.

    Raises UserError or DataError that names what is missing.
    """
    if len(inputs) == 1:
        only = Path(inputs[0])
        if (only / MANIFEST_NAME).is_file() or only.name == MANIFEST_NAME:
            manifest = load_manifest(only)
            return SplitReader(only if only.is_dir() else only.parent, manifest.split(split))
        if only.suffix.lower() in (".csv", ".tsv"):
            return _from_table(only, images, image_column)
    files: list[Path | Piece] = []
    names: list[str] = []
    for word in inputs:
        path = Path(word)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            files += inside
            names += [str(p) for p in inside]
        elif path.suffix.lower() == ".tar":
            for sample in samples_in(path):
                if sample.image is not None:
                    files.append(Piece(path, sample.image.offset, sample.image.size))
                    names.append(sample.key)
        elif path.is_file():
            files.append(path)
            names.append(word)
        else:
            raise UserError(f"no file or folder {word}")
    if not files:
        raise UserError(f"no images ({', '.join(sorted(EXTENSIONS))}) in {' '.join(inputs)}")
    return FileReader(files, names)


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a CSV, or a TSV by its name. Raises DataError for what is no UTF-8 text or has no header."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {path}: {error}") from error
    if not table.fieldnames:
        raise DataError(f"{path} is empty: its first row names the columns")
    return list(table.fieldnames), rows


def _from_table(path: Path, images: Path | None, image_column: str) -> FileReader:
    columns, rows = read_table(path)
    if image_column not in columns:
        raise DataError(f"{path} has no column {image_column!r}{nearest(image_column, columns)} (--image-column)")
    folder = images if images is not None else path.parent
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder")
    known = {p.name: p for p in sorted(folder.rglob("*")) if p.suffix.lower() in EXTENSIONS}
    stems = {p.stem: p for p in known.values()}
    files: list[Path | Piece] = []
    for number, row in enumerate(rows, 2):
        name = row[image_column]
        file = known.get(Path(name).name) or stems.get(Path(name).name)
        if file is None:
            raise DataError(f"{path} row {number}: no image {name!r} in {folder}")
        files.append(file)
    return FileReader(files, [row[image_column] for row in rows])
