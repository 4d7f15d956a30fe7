"""Tar headers, hop by hop: where each member's bytes lie, without reading them.

ustar, GNU long names ('L') and PAX records ('x', 'g') are understood (POSIX.1-2017 pax; GNU tar manual, "Basic Tar
Format"). Only regular files come out: links, devices, absolute paths and '..' are refused, since data are read in
memory and nothing of a shard's naming may reach the file system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distcnn.errors import DataError

BLOCK = 512
READ_AHEAD = 1 << 16  # headers of small members come out of one read
MAX_NAME_BYTES = 1 << 16
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}

ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


def file_reader(file: IO[bytes], size: int) -> ReadAt:
    """A `read(offset, length)` over an open file that keeps the last 64 KiB read."""
    start, block = 0, b""

    def read(offset: int, length: int) -> bytes:
        nonlocal start, block
        if not (start <= offset and offset + length <= start + len(block)):
            file.seek(offset)
            start, block = offset, file.read(min(max(length, READ_AHEAD), max(size - offset, 0)))
        return block[offset - start : offset - start + length]

    return read


def iterate_members(path: Path) -> Iterator[Member]:
    """The regular members of a local tar file in their order. Raises DataError that names the file and the place."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield from members_from(file_reader(file, size), size, str(path))
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror or error}") from error


def members_from(read: ReadAt, total: int, name: str) -> Iterator[Member]:
    """The regular members of a tar of `total` bytes read through `read`; `name` is used in errors."""
    if total == 0:
        raise DataError(f"shard {name} is empty (0 bytes): write it again, or leave it out")
    _refuse_compressed(read(0, BLOCK), name)
    offset = 0
    common: dict[str, str] = {}  # PAX records for all members that follow
    override: dict[str, str] = {}  # and for the next one only
    while True:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            if offset == total and offset > 0:
                return  # no end-of-archive marker, but every member whole: GNU tar reads on, so do we
            raise DataError(f"shard {name} is truncated at byte {offset + len(header)} (within a header)")
        if header[0] == 0 and not header.strip(b"\0"):
            return
        _check_sum(header, offset, name)
        kind = header[156:157]
        size = int(override.get("size", common.get("size", 0))) or _number(header[124:136], offset, name)
        data = offset + BLOCK
        if data + size > total:
            raise DataError(
                f"shard {name} is truncated: the member at byte {offset} needs {size} bytes, {total - data} are left"
            )
        offset = data + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            _take_extension(kind, read, data, size, override, common, name)
            continue
        path = str(override.get("path") or common.get("path") or _name(header))
        override = {}
        if kind in (b"0", b"\0", b"7"):
            if path.startswith("/") or ".." in path.split("/"):
                raise DataError(f"shard {name}: member {path!r} points outside of the archive: refused")
            yield Member(path.removeprefix("./"), data, size)
        elif kind not in (b"5",):
            raise DataError(f"shard {name}: member {path!r} is a link or device (type {kind!r}): refused")


def _refuse_compressed(head: bytes, name: str) -> None:
    for magic, (what, command) in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"shard {name} is {what}-compressed and cannot be read at random: run '{command}' on it")


def _take_extension(
    kind: bytes,
    read: ReadAt,
    data: int,
    size: int,
    override: dict[str, str],
    common: dict[str, str],
    name: str,
) -> None:
    """Read a member that speaks of the next one (GNU 'L' name, PAX 'x') or of all that follow (PAX 'g')."""
    if size > MAX_NAME_BYTES:
        raise DataError(f"shard {name}: extended header of {size} bytes at byte {data - BLOCK}: not a sane tar")
    body = read(data, size)
    if kind == b"L":
        override["path"] = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
    elif kind in (b"x", b"g"):
        (override if kind == b"x" else common).update(_pax_records(body, data, name))


def _pax_records(body: bytes, offset: int, name: str) -> dict[str, str]:
    """'<length> <key>=<value>\\n' records, of which path and size matter here."""
    records: dict[str, str] = {}
    at = 0
    while at < len(body) and body[at : at + 1] != b"\0":
        space = body.find(b" ", at, at + 20)
        length = body[at:space]
        if space < 0 or not length.isdigit() or int(length) <= space - at:
            raise DataError(f"shard {name}: bad PAX record at byte {offset + at}")
        key, _, value = body[space + 1 : at + int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return records


def _check_sum(header: bytes, offset: int, name: str) -> None:
    try:
        stated = int(header[148:156].rstrip(b" \0") or b"-1", 8)
    except ValueError:
        stated = -1
    if stated != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        what = "is not a tar file" if offset == 0 else f"is damaged: bad header checksum at byte {offset}"
        raise DataError(f"shard {name} {what}")


def _number(octets: bytes, offset: int, name: str) -> int:
    """Octal text, or GNU's base-256 for sizes of 8 GiB and more."""
    try:
        if octets[0] & 0x80:
            return int.from_bytes(octets, "big") & ~(0x80 << (8 * (len(octets) - 1)))
        return int(octets.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise DataError(f"shard {name} is damaged: bad size in the header at byte {offset}") from error


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")
