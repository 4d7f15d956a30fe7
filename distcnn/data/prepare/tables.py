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
from distcnn.data.prepare.source import FREE, SPLITS, Ids, Source, digest_of, number_labels, printable
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
    table.column(columns.image, "--image-column")  # told of before what costs time
    labels, classes = read_labels(table, columns.label)
    groups = read_groups(table, columns.group) if columns.group else None
    found = find_images(images)
    rows = named_rows(table, columns.image, images, found)
    left_out = len(found.paths) - len(rows.names)
    split_of = np.full(len(labels), FREE, dtype=np.int64)
    if test_file is not None:
        where = test_images or images
        test = named_rows(
            read_table(test_file, encoding), columns.image, where, find_images(where) if test_images else found
        )
        rows, n = rows.followed_by(test), len(test.names)
        left_out -= 0 if test_images else n
        split_of = np.append(split_of, np.full(n, SPLITS.index("test")))
        labels = np.append(labels, np.full(n, UNLABELLED))
        groups = None if groups is None else np.append(groups, np.full(n, -1))
    return Source(
        kind="csv",
        name=file.resolve().stem if file.stem != "train" else file.resolve().parent.name,
        classes=classes,
        names=rows.names,
        labels=labels,
        payload=rows.paths.__getitem__,
        sizes=rows.sizes,
        digest=digest_of(
            rows.found, rows.names, labels, rows.sizes, rows.times, split_of, np.array([]) if groups is None else groups
        ),
        split_of=split_of,
        groups=groups,
        where=lambda i: f"{rows.tell[i]}, {rows.names[i]}",
        warnings=_left_out(left_out, images),
    )


@dataclass(frozen=True)
class Rows:
    """Rows with the image of each: the name in the table, where it was found, the file, bytes, time of change, line."""

    names: list[str]
    found: list[str]
    paths: list[str]
    sizes: Ids
    times: Ids
    tell: list[str]

    def followed_by(self, other: Rows) -> Rows:
        return Rows(
            self.names + other.names,
            self.found + other.found,
            self.paths + other.paths,
            np.append(self.sizes, other.sizes),
            np.append(self.times, other.times),
            self.tell + other.tell,
        )


def named_rows(table: Table, column: str, folder: Path, found: Found) -> Rows:
    """The rows of a table with the images in `folder` that they name. Raises DataError as `match` does."""
    names = table.column(column, "--image-column")
    places = match(table, names, folder, found)
    paths = [found.paths[at] for at in places]
    root = folder.resolve()
    tell = [table.line(row) for row in range(len(names))]
    return Rows(names, paths, [f"{root}/{path}" for path in paths], found.sizes[places], found.times[places], tell)


def _left_out(count: int, images: Path) -> tuple[str, ...]:
    return (f"{count} images in {images} are in no row of the table and were left out",) if count > 0 else ()


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
    return number_labels([printable(value) for value in values], None, f"{table.file} column {column!r}")


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
