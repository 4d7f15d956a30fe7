"""Tar headers, hop by hop: where each member's bytes lie, without reading them.

ustar, GNU long names ('L') and PAX records ('x', 'g') are understood (POSIX.1-2017 pax; GNU tar manual, "Basic Tar
Format"). Only regular files come out: links, devices, absolute paths and '..' are refused, since data are read in
memory and nothing of a shard's naming may reach the file system.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from distcnn.errors import DataError

BLOCK = 512
READ_AHEAD = 1 << 18  # small members: many headers come out of one read
HOP = 1 << 12  # large members: a header, and the small member beside it, if any
MAX_NAME_BYTES = 1 << 16
MAX_PAX_BYTES = 1 << 20  # PAX carries extended attributes too
MAX_END_BYTES = 1 << 20  # of zeros after the end that are looked through for a second archive
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_REGULAR = (0x30, 0x00, 0x37)  # '0', NUL of the oldest tars, '7' contiguous
_DIRECTORY = 0x35
_LINKS = {0x31: "a hard link", 0x32: "a symbolic link", 0x33: "a device", 0x34: "a device", 0x36: "a FIFO"}
_EXTENSIONS = (0x78, 0x58, 0x67, 0x4C, 0x4B)  # 'x', Solaris' 'X', 'g', 'L', 'K'
_USED_RECORDS = (b"path", b"size")

ReadAt = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A regular file in a tar: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


def file_reader(file: IO[bytes], size: int, read_ahead: int = READ_AHEAD, hop: int = HOP) -> ReadAt:
    """A `read(offset, length)` over an open file of `size` bytes; it returns fewer bytes only at the end of the file.

    It keeps one block: a read that goes on where the block ends takes `read_ahead` bytes, one that jumps takes `hop`.
    """
    start, end, block = 0, 0, b""

    def read(offset: int, length: int) -> bytes:
        nonlocal start, end, block
        if offset < start or offset + length > end:
            wanted = read_ahead if start <= offset <= end else hop
            file.seek(offset)
            block = file.read(min(max(length, wanted), max(size - offset, 0)))
            start, end = offset, offset + len(block)
        return block[offset - start : offset - start + length]

    return read


def iterate_members(path: Path) -> Iterator[Member]:
    """The regular members of a local tar file in their order. Raises DataError that names the file and the place."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            yield from members_from(file_reader(file, size), size, str(path))
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror or error}") from error


def members_from(read: ReadAt, total: int, name: str) -> Iterator[Member]:
    """The regular members of a tar of `total` bytes read through `read`; `name` is used in errors.

    A leading './' is taken off the names. Raises DataError for what is no whole, plain tar: see the module's text.
    """
    if total == 0:
        raise DataError(f"shard {name} is empty (0 bytes): write it again, or leave it out")
    _refuse_compressed(read(0, BLOCK), name)
    offset = 0
    common: dict[str, str] = {}  # PAX records for all members that follow
    override: dict[str, str] = {}  # and for the next one only
    while True:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            raise DataError(_cut_off(name, offset, total))
        if header[0] == 0 and not header.strip(b"\0"):
            return _refuse_second_archive(read, offset, name)
        _check_sum(header, offset, name)
        kind = header[156]
        data = offset + BLOCK
        size = _number(header[124:136], offset, name)
        if kind in _EXTENSIONS:
            _refuse_overrun(name, offset, data, size, total)
            _take_extension(kind, read(data, _bounded(kind, size, offset, name)), data, override, common, name)
            offset = data - (-size // BLOCK) * BLOCK
            continue
        path = override.get("path") or common.get("path") or _name(header)
        if "size" in override or "size" in common:
            size = _pax_number(override.get("size", common.get("size", "")), offset, name)
        if override:
            override = {}
        if kind == _DIRECTORY or (kind == 0 and _name(header).endswith("/")):
            offset = data  # whatever its size field says, a directory has no data
            continue
        if kind not in _REGULAR:
            what = _LINKS.get(kind, f"of type {chr(kind)!r}")
            raise DataError(f"shard {name}: member {path!r} is {what}, not a plain file: refused")
        if path.startswith("/") or (".." in path and ".." in path.split("/")):
            raise DataError(f"shard {name}: member {path!r} points outside of the archive: refused")
        _refuse_overrun(name, offset, data, size, total)
        yield Member(path.removeprefix("./"), data, size)
        offset = data - (-size // BLOCK) * BLOCK


def header_size(header: bytes) -> int:
    """The size that a member's header states, -1 if these 512 bytes are no header."""
    if len(header) < BLOCK or not _sums_right(header):
        return -1
    try:
        return _number(header[124:136], 0, "")
    except DataError:
        return -1


def _refuse_compressed(head: bytes, name: str) -> None:
    for magic, (what, command) in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"shard {name} is {what}-compressed and cannot be read at random: run '{command}' on it")


def _cut_off(name: str, offset: int, total: int) -> str:
    """Why there is no header at `offset`.

    A tar without its end-of-archive marker may be whole, and tar reads it, but so does one cut between two members,
    and then samples would be missing without a word.
    """
    if 0 < offset <= total and (total - offset) % BLOCK == 0:
        return (
            f"shard {name} is truncated: no end-of-archive marker after byte {offset}"
            f" (if it is whole all the same: truncate -s +{2 * BLOCK} FILE adds the marker)"
        )
    return f"shard {name} " + (
        f"is truncated at byte {total} (within a header or its data)"
        if offset
        else f"is not a tar file ({total} bytes)"
    )


def _refuse_overrun(name: str, offset: int, data: int, size: int, total: int) -> None:
    if data + size > total:
        raise DataError(
            f"shard {name} is truncated: the member at byte {offset} needs {size} bytes, {total - data} are left"
        )


def _refuse_second_archive(read: ReadAt, offset: int, name: str) -> None:
    """Tars joined with `cat` would lose all members but the first one's, without a word."""
    for at in range(offset + BLOCK, offset + MAX_END_BYTES, BLOCK):
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            return
        if header.strip(b"\0"):
            if _sums_right(header):
                raise DataError(
                    f"shard {name} holds a second archive after the end of the first, at byte {at}:"
                    " join tars with 'tar --concatenate', not with 'cat'"
                )
            return


def _bounded(kind: int, size: int, offset: int, name: str) -> int:
    if size > (MAX_NAME_BYTES if kind in b"LK" else MAX_PAX_BYTES):
        raise DataError(f"shard {name}: extended header of {size} bytes at byte {offset}: not a sane tar")
    return size


def _take_extension(
    kind: int, body: bytes, data: int, override: dict[str, str], common: dict[str, str], name: str
) -> None:
    """Take in a member that speaks of the next one (GNU 'L' name, PAX 'x') or of all that follow (PAX 'g')."""
    if kind == 0x4C:
        override["path"] = body.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    elif kind in b"xXg" and (b"path=" in body or b"size=" in body or b"GNU.sparse" in body):
        (common if kind == 0x67 else override).update(_pax_records(body, data, name))


def _pax_records(body: bytes, offset: int, name: str) -> dict[str, str]:
    """'<length> <key>=<value>\\n' records, of which path and size matter here."""
    records: dict[str, str] = {}
    at = 0
    while at < len(body) and body[at : at + 1] != b"\0":
        space = body.find(b" ", at, at + 20)
        length = body[at:space] if space > at else b""
        end = at + int(length) if length.isdigit() else 0
        if end <= space + 1 or end > len(body) or body[end - 1 : end] != b"\n":
            raise DataError(f"shard {name} is damaged: bad PAX record at byte {offset + at}")
        key, _, value = body[space + 1 : end - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise DataError(f"shard {name} holds a sparse file (byte {offset}): write it again without --sparse")
        if key in _USED_RECORDS:
            text = value.decode("utf-8", "surrogateescape")
            records[key.decode()] = text.rstrip("/") if key == b"path" else text  # as tarfile does it
        at = end
    return records


def _check_sum(header: bytes, offset: int, name: str) -> None:
    """Raises DataError unless the header's checksum is right.

    Adler-32's low half is 1 + the sum of the bytes modulo 65521 (RFC 1950), in a tenth of the time of `sum`.
    """
    field = header[148:156]
    try:
        stated = int(field.strip(b" \0"), 8)
    except ValueError:
        stated = -1
    if (stated - 256 + sum(field) + 1) % 65521 != zlib.adler32(header) & 0xFFFF and not _sums_right(header):
        what = "is not a tar file" if offset == 0 else f"is damaged: bad header checksum at byte {offset}"
        raise DataError(f"shard {name} {what}")


def _sums_right(header: bytes) -> bool:
    """Whether the checksum fits exactly, with the bytes unsigned, or signed as some old tars had it."""
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    others = header[:148] + header[156:]
    unsigned = 8 * 32 + sum(others)
    return stated in (unsigned, unsigned - 256 * sum(octet > 127 for octet in others))


def _number(octets: bytes, offset: int, name: str) -> int:
    """Octal text, or GNU's base-256 for sizes of 8 GiB and more."""
    try:
        number = int(octets.strip(b" \0") or b"0", 8) if octets[0] < 0x80 else int.from_bytes(octets[1:], "big")
    except ValueError:
        number = -1
    if number < 0 or octets[0] > 0x80:
        raise DataError(f"shard {name} is damaged: bad size in the header at byte {offset}")
    return number


def _pax_number(text: str, offset: int, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DataError(f"shard {name} is damaged: bad PAX size {text[:20]!r} before byte {offset}")
    return int(text)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")
