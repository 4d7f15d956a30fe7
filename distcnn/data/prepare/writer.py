"""Parts to shards: cut by count and by bytes, hashed as they are written, on the disk before anything names them."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from distcnn.data.manifest import Shard
from distcnn.data.prepare.handover import memory_of
from distcnn.data.prepare.work import Part
from distcnn.data.shards import IndexRows, index_dtype
from distcnn.data.tar import BLOCK
from distcnn.errors import UserError

RECORD = 20 * BLOCK  # tarfile pads an archive to whole records


@dataclass(frozen=True)
class Limits:
    """A shard is full at `samples` samples, or once its members have `bytes` bytes."""

    samples: int = 5000
    bytes: int = 128 << 20

    def __post_init__(self) -> None:
        if self.samples < 1 or self.bytes < 1:
            raise UserError(f"--shard-samples {self.samples}, --shard-bytes {self.bytes}: each at least 1")


class ShardWriter:
    """Writes the shards of one split into `folder` as <split>-000000.tar, with the index <split>-000000.npy beside.

    What webdataset.ShardWriter does, for parts that were packed elsewhere. Shards are synced in a thread of their own,
    one at a time, while the next one is written. Raises OSError if the disk is full. Use as a context manager.
    """

    def __init__(self, folder: Path, split: str, limits: Limits) -> None:
        self.folder, self.split, self.limits = folder, split, limits
        self.shards: list[Shard] = []
        self._file: IO[bytes] | None = None
        self._sha: Any = None
        self._position = 0
        self._rows: list[IndexRows] = []
        self._samples = 0
        self._buffer = bytearray()  # that parts are read into
        self._syncer = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._syncer.shutdown()

    def add(self, part: Part) -> None:
        """Append the samples of a part, in their order; they may end one shard and begin others."""
        view, ends = memory_of(part.tar, self._buffer), part.ends
        first, start = 0, 0
        while first < len(ends):
            if self._file is None:
                self._open()
            full = int(np.searchsorted(ends, self.limits.bytes - self._position + start)) + 1
            stop_row = min(first + self.limits.samples - self._samples, full, len(ends))
            stop = int(ends[stop_row - 1])
            self._append(view[start:stop], part.rows[first:stop_row], start)
            first, start = stop_row, stop
            if self._samples >= self.limits.samples or self._position >= self.limits.bytes:
                self._close()

    def finish(self) -> tuple[Shard, ...]:
        """End the last shard; all of them in their order, safe on the disk."""
        if self._file is not None:
            self._close()
        self._wait()
        return tuple(self.shards)

    def _open(self) -> None:
        self._file = (self.folder / f"{self.split}-{len(self.shards):06d}.tar").open("wb")
        self._sha, self._position, self._samples, self._rows = hashlib.sha256(), 0, 0, []

    def _append(self, members: memoryview, rows: IndexRows, start: int) -> None:
        """Write bytes that began at `start` in their part; the rows' offsets move with them."""
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
        """End the archive as tarfile does, write the index, and leave both to the syncing thread."""
        assert self._file is not None
        self._write(bytes(2 * BLOCK + -(self._position + 2 * BLOCK) % RECORD))
        stem = f"{self.split}-{len(self.shards):06d}"
        tar, self._file = self._file, None
        shard = Shard(f"{stem}.tar", f"{stem}.npy", self._samples, self._position, self._sha.hexdigest())
        self.shards.append(shard)
        self._wait()
        self._syncing = self._syncer.submit(_sync, tar, self.folder / shard.index, join_rows(self._rows))

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()


def _sync(tar: IO[bytes], index: Path, rows: IndexRows) -> None:
    """Both files on the disk. Raises OSError."""
    with tar:
        tar.flush()
        os.fsync(tar.fileno())
    with index.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def join_rows(parts: list[IndexRows]) -> IndexRows:
    """Index rows one after the other, with a key field as wide as the widest."""
    width = max((rows.dtype["key"].itemsize for rows in parts), default=1)
    out = np.empty(sum(map(len, parts)), dtype=index_dtype(width))
    for name in out.dtype.names or ():
        out[name] = np.concatenate([rows[name] for rows in parts])
    return out
