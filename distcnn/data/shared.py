"""Memory that other processes can map, by a path under /proc: on Linux, and for processes of the same user.

It has no name in a folder and no size of a file system that could be too small (as /dev/shm in a container), and
nothing of it outlives the process that made it, however that ends.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
import torch

from distcnn.data.decode import OFF, Pixels


def available() -> bool:
    """Whether the system has such memory."""
    return hasattr(os, "memfd_create")


@dataclass(frozen=True, slots=True)
class Address:
    """Where another process finds the memory, and which it is: the path of memory that is gone is used again."""

    path: str
    inode: int
    size: int


def _mapped(file: int, size: int) -> Pixels:
    """The file's memory but for its beginning, see `distcnn.data.decode.offset`: a mapping begins with a page."""
    return np.frombuffer(mmap.mmap(file, OFF + size), dtype=np.uint8, offset=OFF)


class SharedMemory:
    """`size` bytes, zero at first; `pixels` (size,) uint8. The memory lives as long as anything refers to `pixels`."""

    def __init__(self, size: int) -> None:
        file = os.memfd_create("distcnn")
        self._file = file
        os.ftruncate(file, OFF + size)
        self.pixels = _mapped(file, size)
        self.address = Address(f"/proc/{os.getpid()}/fd/{file}", os.fstat(file).st_ino, size)

    def pin(self) -> None:
        """Lock the pages, so that a GPU copies from them by itself. Where CUDA refuses, copies are only slower."""
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        cuda.cudaHostRegister(self.pixels.ctypes.data - OFF, OFF + len(self.pixels), 0)  # from a page's beginning on

    def __del__(self) -> None:
        os.close(self._file)


class Mappings:
    """In another process: memory by its address, mapped once."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[Address, Pixels]] = {}

    def pixels(self, address: Address) -> Pixels:
        """(size,) uint8. Raises OSError where there is no way to it."""
        known = self._mapped.get(address.path)
        if known is None or known[0] != address:
            with open(address.path, "r+b") as file:  # noqa: PTH123 - no path that pathlib could know
                known = address, _mapped(file.fileno(), address.size)
            self._mapped[address.path] = known
        return known[1]
