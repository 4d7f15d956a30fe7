"""Parts to shards: cut by count and by bytes, hashed as they are written, on the disk before they are named."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from distcnn.data.manifest import Shard
from distcnn.data.prepare.work import Part
from distcnn.data.shards import IndexRows, index_dtype
from distcnn.data.tar import BLOCK

RECORD = 20 * BLOCK  # tarfile pads an archive to whole records


@dataclass(frozen=True)
class Limits:
    """A shard is full at `samples` samples, or when its members have `bytes` bytes or more."""

    samples: int
    bytes: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.bytes < 1:
            raise ValueError(f"a shard of at most {self.samples} samples and {self.bytes} bytes holds nothing")


class ShardWriter:
    """Writes the shards of one split into `folder` as <split>-000000.tar, with the index <split>-000000.npy beside.

    What webdataset.ShardWriter does, for parts packed elsewhere. Raises OSError if the disk is full.
    """

    def __init__(self, folder: Path, split: str, limits: Limits) -> None:
        self.folder, self.split, self.limits = folder, split, limits
        self.shards: list[Shard] = []
        self._file: IO[bytes] | None = None
        self._sha: Any = None
        self._position = 0
        self._rows: list[IndexRows] = []
        self._samples = 0

    def add(self, part: Part) -> None:
        """Append the samples of a part, in their order; they may end one shard and begin others."""
        view = memoryview(part.tar)
        ends = np.array(part.ends, dtype=np.int64)
        start_row, start = 0, 0
        while start_row < len(ends):
            if self._file is None:
                self._open()
            full = int(np.searchsorted(ends, self.limits.bytes - self._position + start)) + 1
            stop_row = min(start_row + self.limits.samples - self._samples, full, len(ends))
            stop = int(ends[stop_row - 1])
            self._append(view[start:stop], part.rows[start_row:stop_row], start)
            start_row, start = stop_row, stop
            if self._samples >= self.limits.samples or self._position >= self.limits.bytes:
                self._close()

    def finish(self) -> tuple[Shard, ...]:
        """Close the last shard; the shards in their order."""
        if self._file is not None:
            self._close()
        return tuple(self.shards)

    def abandon(self) -> None:
        """Close the file at hand; its content does not matter any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self._file = (self.folder / f"{self.split}-{len(self.shards):06d}.tar").open("wb")
        self._sha, self._position, self._samples, self._rows = hashlib.sha256(), 0, 0, []

    def _append(self, members: memoryview, rows: IndexRows, start: int) -> None:
        """Write the bytes that began at `start` in their part; the rows' offsets move with them."""
        rows = rows.copy()
        rows["offset"] += self._position - start
        self._write(members)
        self._rows.append(rows)
        self._samples += len(rows)

    def _write(self, data: memoryview | bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._sha.update(data)
        self._position += len(data)

    def _close(self) -> None:
        """End the archive, sync it, write the index."""
        assert self._file is not None
        end = self._position + 2 * BLOCK
        self._write(bytes(2 * BLOCK + -end % RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        stem = f"{self.split}-{len(self.shards):06d}"
        with (self.folder / f"{stem}.npy").open("wb") as index:
            np.save(index, join_rows(self._rows), allow_pickle=False)
            index.flush()
            os.fsync(index.fileno())
        shard = Shard(f"{stem}.tar", f"{stem}.npy", self._samples, self._position, self._sha.hexdigest())
        self.shards.append(shard)


def join_rows(parts: list[IndexRows]) -> IndexRows:
    """Index rows one after the other, with a key field as wide as the widest."""
    width = max((rows.dtype["key"].itemsize for rows in parts), default=1)
    out = np.empty(sum(map(len, parts)), dtype=index_dtype(width))
    for name in out.dtype.names or ():
        if parts:
            out[name] = np.concatenate([rows[name] for rows in parts])
    return out
