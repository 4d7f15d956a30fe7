"""Samples to the bytes of a tar, the same to the byte as webdataset's TarWriter writes (a test compares).

TarWriter itself takes 25 us a member, most of it in `tarfile`: more than an image of 32 px takes to be read and
decoded. Here it is 2 us: headers come from a template.
"""

from __future__ import annotations

import tarfile
import zlib

from distcnn.data.tar import BLOCK

MAX_MEMBER_NAME = 100  # bytes: the name field of a ustar header
MAX_MEMBER_BYTES = 1 << 33  # what its 11 octal digits can say
MODE = 0o444  # as TarWriter's
_ZEROS = bytes(BLOCK)


class Packer:
    """Samples of a part of a tar, one after the other. The end-of-archive blocks are for whoever joins the parts."""

    def __init__(self) -> None:
        self.size = 0  # bytes so far
        self._pieces: list[bytes] = []

    def add(self, key: str, members: dict[str, bytes], image: str) -> int:
        """Add the members of a sample, by extension; returns the offset of the bytes of the one called `image`.

        Raises ValueError if a ustar header has no room for a name or a size, or a key is not ASCII.
        """
        found = -1
        for extension in sorted(members):
            data = members[extension]
            size = len(data)
            name = f"{key}.{extension}".encode("ascii")
            if len(name) > MAX_MEMBER_NAME or size >= MAX_MEMBER_BYTES:
                raise ValueError(f"member {key}.{extension} of {size} bytes does not fit a ustar header")
            pad = -size % BLOCK
            self._pieces += (header(name, size), data, _ZEROS[:pad])
            self.size += BLOCK
            if extension == image:
                found = self.size
            self.size += size + pad
        return found

    def take(self) -> bytes:
        """The bytes written."""
        return b"".join(self._pieces)


def _blank() -> bytes:
    """The header of a member without name and of size 0, of nobody, from 1970."""
    info = tarfile.TarInfo("")
    info.mode, info.mtime = MODE, 0
    return info.tobuf(tarfile.USTAR_FORMAT)


_BLANK = _blank()
_OWNER, _TIME, _REST = _BLANK[100:124], _BLANK[136:148], _BLANK[156:]
_SUM = sum(_OWNER) + sum(_TIME) + 8 * 32 + sum(_REST)  # the checksum counts as 8 spaces


def header(name: bytes, size: int) -> bytes:
    """The 512 bytes before a member. adler32's low half is 1 + the sum of so few bytes, 5 times as fast as `sum`."""
    octal = b"%011o\0" % size
    total = _SUM + (zlib.adler32(name + octal) & 0xFFFF) - 1
    return b"%b%b%b%b%06o\0 %b" % (name.ljust(100, b"\0"), _OWNER, octal, _TIME, total, _REST)
