"""The text indexes that wds2idx writes (NVIDIA DALI, tools/wds2idx.py), version 1.2, as the members of a shard.

`v1.2 <samples>`, then a line a sample: `<extension> <offset> <size> <name>` for each of its members, with blanks
between. Names with blanks cannot be told apart, by DALI no more than here. What an index says is checked against the
tar at some places: an index of an older tar is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from distcnn.data.sources import read_small
from distcnn.data.tar import BLOCK, Member, ReadAt, header_size
from distcnn.errors import DataError

MAX_INDEX_BYTES = 1 << 30
CHECKED_MEMBERS = 64


def index_beside(shard: str) -> str:
    """Where wds2idx puts the index of a shard: the name up to the first dot of the file's name, and '.idx'."""
    folder, slash, base = shard.rpartition("/")
    return folder + slash + base[:1] + base[1:].partition(".")[0] + ".idx"


def members_by_index(shard: str, read: ReadAt, total: int) -> list[Member]:
    """The members of a shard of `total` bytes by the index beside it. Raises DataError naming index, line and why."""
    path = index_beside(shard)
    members = list(_parse(read_small(path, MAX_INDEX_BYTES), path))
    for member in members:
        if member.offset < BLOCK or member.offset % BLOCK or member.offset + member.size > total:
            raise DataError(
                f"index {path} does not fit shard {shard}: {member.name!r} at byte {member.offset},"
                f" {member.size} bytes, of {total}; run wds2idx again"
            )
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise DataError(f"index {path}: member {member.name!r} points outside of the archive: refused")
    for member in members[:: max(1, len(members) // CHECKED_MEMBERS)]:
        if header_size(read(member.offset - BLOCK, BLOCK)) != member.size:
            raise DataError(
                f"index {path} does not fit shard {shard}: no {member.name!r} of {member.size} bytes at byte"
                f" {member.offset}; run wds2idx again"
            )
    return members


def _parse(data: bytes, path: str) -> Iterator[Member]:
    lines = data.decode("utf-8", "surrogateescape").splitlines()
    version, *rest = lines[0].split() if lines else [""]
    if version != "v1.2" or len(rest) != 1 or not rest[0].isdigit():
        hint = "; v1.1 has no names: run a current wds2idx" if version == "v1.1" else ""
        raise DataError(f"index {path} does not begin with 'v1.2 <samples>'{hint}")
    if len(lines) - 1 != int(rest[0]):
        raise DataError(f"index {path} is truncated: {len(lines) - 1} of {rest[0]} samples")
    for number, line in enumerate(lines[1:], start=2):
        words = line.split(" ")
        if len(words) % 4 or not all(word.isascii() and word.isdigit() for word in words[1::4] + words[2::4]):
            raise DataError(
                f"index {path}, line {number}: not '<extension> <offset> <size> <name>' for each member"
                " (names with blanks: index without --wds2idx)"
            )
        for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True):
            yield Member(name.removeprefix("./"), int(offset), int(size))
