"""Parquet files of images with labels, the form of image data sets on the Hugging Face hub. Needs pyarrow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distcnn.data.prepare.folders import SPLIT_FOLDERS
from distcnn.data.prepare.source import FREE, Ids, Payload, Slice, Source, digest_of, number_labels, printable
from distcnn.errors import DataError, UserError, nearest

BATCH_ROWS = 64
SPOOL = "images.bin"


@dataclass
class _Spool:
    """Where the encoded images lie once they are unpacked. `offsets` (N,) and `sizes` (N,) int64 bytes."""

    files: list[Path]
    column: str
    offsets: Ids
    sizes: Ids
    path: str = ""

    def unpack(self, folder: Path) -> None:
        """Write the images one after the other into `folder`: a parquet file cannot be read in any order."""
        self.path = str(folder / SPOOL)
        at = position = 0
        with Path(self.path).open("wb") as out:
            for data in _images(self.files, self.column):
                out.write(data)
                self.offsets[at], self.sizes[at] = position, len(data)
                position += len(data)
                at += 1

    def payload(self, i: int) -> Payload:
        return Slice(self.path, int(self.offsets[i]), int(self.sizes[i]))


def from_parquet(source: Path, image_column: str = "image", label_column: str = "label") -> Source:
    """The images of a .parquet file, or of all below a folder: bytes, or {bytes, path}, beside a label.

    Files called train-..., test-... or validation-... (as the hub has them) keep their split. The names of classes
    come from the hub's metadata where it is there. Raises DataError naming file and row, UserError without pyarrow.
    """
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise DataError(f"{source} is no .parquet file and holds none")
    texts: list[str] = []
    names: list[str] = []
    tell: list[tuple[Path, int]] = []
    splits: list[int] = []
    classes: tuple[str, ...] | None = None
    for file in files:
        opened = _open(file)
        hub_classes = _hub_classes(opened, label_column)
        classes = classes or hub_classes
        labels, paths = _read_columns(opened, file, image_column, label_column)
        texts += labels
        names += paths
        tell += [(file, row) for row in range(len(labels))]
        splits += [SPLIT_FOLDERS.get(file.name.split("-")[0].split(".")[0].lower(), FREE)] * len(labels)
    ids, classes = number_labels(texts, classes, str(source))
    n = len(texts)
    named = all(names)
    facts = [file.stat() for file in files]
    spool = _Spool(files, image_column, np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64))
    return Source(
        kind="parquet",
        name=source.resolve().stem,
        classes=classes,
        names=[printable(name) for name in names] if named else [f"{i:08d}" for i in range(n)],
        named=named,
        labels=ids,
        payload=spool.payload,
        sizes=spool.sizes,
        digest=digest_of([str(f.name) for f in files], np.array([(f.st_size, f.st_mtime_ns) for f in facts])),
        split_of=np.array(splits, dtype=np.int64),
        where=lambda i: f"{tell[i][0]} row {tell[i][1]}",
        unpack=spool.unpack,
    )


def _open(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'distcnn[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _hub_classes(opened: Any, column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel, from the hub's description in the file's metadata."""
    text = (opened.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        return tuple(str(name) for name in json.loads(text)["info"]["features"][column]["names"]) if text else None
    except (ValueError, KeyError, TypeError):
        return None


def _read_columns(opened: Any, file: Path, image: str, label: str) -> tuple[list[str], list[str]]:
    """(labels as text, names of the images or '') of a file; the images themselves are not read."""
    schema = opened.schema_arrow
    for column, flag in ((image, "--image-column"), (label, "--label-column")):
        if column not in schema.names:
            there = ", ".join(schema.names)
            raise DataError(f"{file} has no column {column!r}{nearest(column, schema.names)} (it has: {there}); {flag}")
    kind = schema.field(image).type
    subfields = [kind.field(i).name for i in range(kind.num_fields)]
    if "binary" not in str(kind) or (subfields and "bytes" not in subfields):
        raise DataError(f"{file}: column {image!r} is {kind}, not the bytes of images, nor {{bytes, path}}")
    labels = opened.read(columns=[label]).column(label).to_pylist()
    for row, value in enumerate(labels):
        if not isinstance(value, (int, str)) or value == "":
            raise DataError(f"{file} row {row}: label {value!r} is no integer or text")
    paths = [""] * len(labels)
    if "path" in subfields:
        rows = opened.read(columns=[f"{image}.path"]).column(image).to_pylist()
        paths = [(row or {}).get("path") or "" for row in rows]
    return [printable(str(value)) for value in labels], paths


def _images(files: list[Path], column: str) -> Iterator[bytes]:
    """The bytes of each image, b'' for a missing one, a few rows in memory at a time."""
    for file in files:
        batches = _open(file).iter_batches(batch_size=BATCH_ROWS, columns=[column])
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError) as error:  # pyarrow's errors are of these
                raise DataError(f"cannot read {file}: {error}") from error
            if batch is None:
                break
            for value in batch.column(0).to_pylist():
                data = value.get("bytes") if isinstance(value, dict) else value
                yield data or b""
