"""Samples to the bytes of a tar, the same to the byte as webdataset's TarWriter writes (a test compares).

TarWriter itself takes 25 us a member, most of it in `tarfile`: more than an image of 32 px takes to be read and
decoded. Here it is 0.5 us: the headers of many members are made at once, as rows of an array.
"""

from __future__ import annotations

import tarfile

import numpy as np
from numpy.typing import NDArray

from distcnn.data.tar import BLOCK

MAX_MEMBER_NAME = 100  # bytes: the name field of a ustar header
MAX_MEMBER_BYTES = 1 << 33  # what its 11 octal digits can say
MODE = 0o444  # as TarWriter's
NAME, SIZE, SUM = slice(0, 100), slice(124, 135), slice(148, 154)  # the fields that differ between members


def _blank() -> NDArray[np.uint8]:
    """(512,) the header of a member without name and of size 0, of nobody, from 1970; its checksum as 8 spaces."""
    info = tarfile.TarInfo("")
    info.mode, info.mtime = MODE, 0
    header = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), dtype=np.uint8).copy()
    header[SUM] = ord(" ")
    return header


_BLANK = _blank()
_REST = int(_BLANK.sum() + 2 * ord(" ") - _BLANK[154:156].sum() - _BLANK[SIZE].sum())  # of the sum, what never changes


def _octal(values: NDArray[np.int64], digits: int) -> NDArray[np.uint8]:
    """(n, digits) ASCII of (n,) values."""
    shifts = np.arange(3 * (digits - 1), -1, -3)
    return (((values[:, None] >> shifts) & 7) + ord("0")).astype(np.uint8)


def headers(names: list[str], sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(n, 512): what comes before each member. Raises ValueError where a ustar header has no room for it."""
    out = np.repeat(_BLANK[None], len(names), axis=0)
    if not names:
        return out
    if max(map(len, names)) > MAX_MEMBER_NAME or int(sizes.max()) >= MAX_MEMBER_BYTES:
        worst = max(zip(names, sizes.tolist(), strict=True), key=lambda member: (len(member[0]), member[1]))
        raise ValueError(f"member {worst[0]} of {worst[1]} bytes does not fit a ustar header")
    text = np.array(names, dtype=f"S{MAX_MEMBER_NAME}").view(np.uint8).reshape(-1, MAX_MEMBER_NAME)
    size = _octal(sizes, 11)
    out[:, NAME], out[:, SIZE] = text, size
    out[:, SUM] = _octal(text.sum(axis=1, dtype=np.int64) + size.sum(axis=1, dtype=np.int64) + _REST, 6)
    out[:, SUM.stop] = 0
    return out


def tar_of(names: list[str], contents: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(the members one after the other, (n,) the offset of each content): a part of a tar, whole blocks.

    The blocks that end an archive are for whoever joins the parts. Raises ValueError if a ustar header has no room
    for a name or a size, or a name is not ASCII.
    """
    sizes = np.fromiter(map(len, contents), dtype=np.int64, count=len(contents))
    ends = np.cumsum(1 + -(-sizes // BLOCK))
    starts = ends - 1 + sizes // -BLOCK
    blocks = np.zeros((int(ends[-1]) if len(ends) else 0, BLOCK), dtype=np.uint8)
    blocks[starts] = headers(names, sizes)
    tar = blocks.reshape(-1)
    offsets = (starts + 1) * BLOCK
    memory = tar.data
    for content, start, size in zip(contents, offsets.tolist(), sizes.tolist(), strict=True):
        memory[start : start + size] = content
    return tar, offsets
