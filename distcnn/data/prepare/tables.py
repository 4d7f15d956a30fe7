"""A table (CSV or TSV) that names images and says their classes, beside a folder of images."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distcnn.data.manifest import UNLABELLED
from distcnn.data.prepare.folders import Found, find_images
from distcnn.data.prepare.source import FREE, SPLITS, Ids, Source, digest_of, order_classes, printable
from distcnn.errors import DataError, UserError, nearest

BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+")  # how pandas writes integers of a column that once had a gap


@dataclass(frozen=True)
class Columns:
    """Which columns of the table mean what; `group` may be ''."""

    image: str = "id"
    label: str = "label"
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of a table as columns of text, with the line of each row in its file (the header's is 1)."""

    file: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def column(self, name: str, flag: str) -> list[str]:
        """The values of a column. Raises DataError naming those there are, and the flag that chooses."""
        if name not in self.columns:
            there = ", ".join(self.columns)
            raise DataError(
                f"{self.file} has no column {name!r}{nearest(name, self.columns)} (it has: {there}); {flag} chooses it"
            )
        return self.columns[name]

    def line(self, row: int) -> str:
        return f"{self.file} line {self.lines[row]}"


def from_csv(
    file: Path,
    images: Path,
    columns: Columns,
    test_file: Path | None = None,
    test_images: Path | None = None,
    encoding: str = "utf-8",
) -> Source:
    """The images that `file` names, with or without extension, in the folder `images`, with the classes it says.

    `test_file` names images to be predicted (in `test_images`, else in `images`): they become the split test, without
    labels, whatever other columns it has. Raises DataError naming the line of what is wrong.
    """
    table = read_table(file, encoding)
    names = table.column(columns.image, "--image-column")
    labels, classes = read_labels(table, columns.label)
    groups = read_groups(table, columns.group) if columns.group else None
    found = find_images(images)
    places = match(table, names, images, found)
    paths = [str(images.resolve() / found.paths[at]) for at in places]
    sizes, times, tell = found.sizes[places], found.times[places], [table.line(row) for row in range(len(names))]
    split_of = np.full(len(names), FREE, dtype=np.int64)
    left_out = len(found.paths) - len(names)
    if test_file is not None:
        test = read_table(test_file, encoding)
        more = test.column(columns.image, "--image-column")
        test_folder = test_images or images
        found = find_images(test_folder) if test_images is not None else found
        places = match(test, more, test_folder, found)
        names = names + more
        paths += [str(test_folder.resolve() / found.paths[at]) for at in places]
        sizes, times = np.concatenate([sizes, found.sizes[places]]), np.concatenate([times, found.times[places]])
        tell += [test.line(row) for row in range(len(more))]
        split_of = np.concatenate([split_of, np.full(len(more), SPLITS.index("test"))])
        labels = np.concatenate([labels, np.full(len(more), UNLABELLED)])
        left_out -= len(more) if test_images is None else 0
        if groups is not None:
            groups = np.concatenate([groups, int(groups.max()) + 1 + np.arange(len(more))])
    return Source(
        kind="csv",
        name=file.resolve().stem if file.stem != "train" else file.resolve().parent.name,
        classes=classes,
        names=names,
        labels=labels,
        payload=paths.__getitem__,
        sizes=sizes,
        digest=digest_of(paths, names, labels, sizes, times, split_of, *([] if groups is None else [groups])),
        split_of=split_of,
        groups=groups,
        where=lambda i: f"{tell[i]}, {names[i]}",
        warnings=(f"{left_out} images in {images} are in no row of the table and were left out",)
        if left_out > 0
        else (),
    )


def read_table(file: Path, encoding: str) -> Table:
    """A CSV, or TSV, with a header. Raises DataError for another encoding, ragged rows, no rows; it names the line."""
    text = _decode(file, encoding)
    header_line = text.split("\n", 1)[0]
    delimiter = max(",\t;", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(f"{file} line {reader.line_num}: {len(cells)} values for {len(header)} columns")
            rows.append(cells)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{file} has no rows below its header")
    values = [[cell.strip() for cell in column] for column in zip(*rows, strict=True)]
    return Table(file, dict(zip(header, values, strict=True)), lines)


def _decode(file: Path, encoding: str) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), encoding)
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise UserError(f"--encoding {encoding}: no such encoding; try utf-8, cp1252 or latin-1") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} line {line} is not {encoding} (byte 0x{data[error.start]:02x}):"
            " save the table as UTF-8, or name its encoding, such as --encoding cp1252"
        ) from error


def read_labels(table: Table, column: str) -> tuple[Ids, tuple[str, ...]]:
    """(labels (n,), class names). Raises DataError for an empty label, and if there is one class only."""
    values = table.column(column, "--label-column")
    if "" in values:
        raise DataError(f"{table.line(values.index(''))}: no label in column {column!r}")
    wholes = [WHOLE_FLOAT.fullmatch(value) for value in values]
    if all(wholes):
        values = [whole[1] for whole in wholes if whole]
    classes = order_classes({printable(value) for value in values})
    if len(classes) < 2:
        raise DataError(f"{table.file}: column {column!r} has 1 class ({classes[0]!r}); a classifier needs at least 2")
    label_of = {name: label for label, name in enumerate(classes)}
    return np.array([label_of[printable(value)] for value in values], dtype=np.int64), classes


def read_groups(table: Table, column: str) -> Ids:
    """(n,) int64: a number for each value. Raises DataError for a row without one."""
    values = table.column(column, "--group-column")
    if "" in values:
        raise DataError(f"{table.line(values.index(''))}: no group in column {column!r}")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def match(table: Table, names: Sequence[str], folder: Path, found: Found) -> list[int]:
    """The place in `found` of each name: its path below the folder or its base name, with or without extension.

    Raises DataError for the first row whose image is missing, is not the only one of that name, or came before.
    """
    exact = {printable(path): at for at, path in enumerate(found.paths)}
    others: dict[str, int] = {}  # what else a file may be called -> its place, or -2 if there are two
    for at, path in enumerate(map(printable, found.paths)):
        base = path.rpartition("/")[2]
        for name in {path.rpartition(".")[0], base, base.rpartition(".")[0]} - {path}:
            others[name] = -2 if name in others else at
    places = [exact.get(name, others.get(name, -1)) for name in names]
    absent = [row for row, at in enumerate(places) if at == -1]
    if absent:
        more = f" ({len(absent)} rows lack their image)" if len(absent) > 1 else ""
        raise DataError(f"{table.line(absent[0])}: no image {names[absent[0]]!r} in {folder}{more}")
    seen: dict[int, int] = {}
    for row, at in enumerate(places):
        if at == -2:
            raise DataError(
                f"{table.line(row)}: more than one image in {folder} is called {names[row]!r}:"
                " write its folder and extension too"
            )
        if at in seen:
            raise DataError(
                f"{table.line(row)} names {names[row]!r} again, after {table.line(seen[at])}: keep one of them"
            )
        seen[at] = row
    return places
