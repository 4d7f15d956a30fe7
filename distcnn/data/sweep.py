"""Every image of a set once: the rows of the indexes cut into chunks, and the bytes of a chunk read in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from distcnn.data.decode import DecodeError, decode
from distcnn.data.manifest import Manifest
from distcnn.data.prepare.stats import Sums
from distcnn.data.shards import IndexRows, load_index
from distcnn.data.sources import copy_of, is_remote, open_shard
from distcnn.errors import DataError
from distcnn.files import sha256_of

CHUNK_IMAGES = 1024
CHUNK_BYTES = 64 << 20  # whichever comes first: chunks of large images hold fewer


@dataclass(frozen=True)
class Chunk:
    """Rows `first` ... of the index of a shard, which lies at `path` (or URL). `split` and `shard` say whose."""

    split: str
    shard: int
    path: str
    first: int
    rows: IndexRows

    def images(self) -> Iterator[tuple[int, bytes]]:
        """(place in `rows`, encoded image), in order. Raises DataError naming the shard, and the key it ends in."""
        with open_shard(self.path) as (read, _):
            places = zip(self.rows["offset"].tolist(), self.rows["size"].tolist(), strict=True)
            for place, (offset, size) in enumerate(places):
                data = read(offset, size)
                if len(data) < size:
                    raise DataError(f"shard {self.path} ends within sample {self.key(place)!r}")
                yield place, data

    def key(self, place: int) -> str:
        key: bytes = self.rows["key"][place]
        return key.decode("utf-8", "surrogateescape")


def cut(split: str, shard: int, path: str, rows: IndexRows) -> list[Chunk]:
    """The chunks of a shard. A remote one stays whole, to be fetched once."""
    if is_remote(path) or not len(rows):
        return [Chunk(split, shard, path, 0, rows)] if len(rows) else []
    chunks: list[Chunk] = []
    first, held = 0, 0
    for place, size in enumerate(rows["size"].tolist()):
        held += size
        if held >= CHUNK_BYTES or place + 1 - first >= CHUNK_IMAGES or place + 1 == len(rows):
            chunks.append(Chunk(split, shard, path, first, rows[first : place + 1].copy()))
            first, held = place + 1, 0
    return chunks


def chunks_of(root: Path, manifest: Manifest) -> list[Chunk]:
    """The chunks of all splits of a set, in the order of splits, shards and rows. Raises DataError (load_index)."""
    chunks: list[Chunk] = []
    for name, split in manifest.splits.items():
        for number, shard in enumerate(split.shards):
            path = shard.name if is_remote(shard.name) else str(root / shard.name)
            chunks.extend(cut(name, number, path, load_index(root / shard.index, shard)))
    return chunks


@dataclass
class Verified:
    """What decoding a chunk gave: `sizes` (width, height) by place, None where it is in `bad` with the reason."""

    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    sha256: str = ""


def verify(chunk: Chunk) -> Verified:
    """Decode every image of a chunk. The first chunk of a shard also hashes the whole tar."""
    if not is_remote(chunk.path):
        return _verify_local(chunk)
    with TemporaryDirectory(prefix="distcnn-") as folder:
        copy = copy_of(chunk.path, Path(folder))
        return _verify_local(Chunk(chunk.split, chunk.shard, str(copy), chunk.first, chunk.rows))


def _verify_local(chunk: Chunk) -> Verified:
    out = Verified()
    for place, data in chunk.images():
        try:
            pixels = decode(data)
        except DecodeError as error:
            out.sizes.append(None)
            out.bad.append((place, str(error)))
            continue
        out.sizes.append((pixels.shape[1], pixels.shape[0]))
        out.sums.add(pixels)
    out.sums.settle()
    if chunk.first == 0:
        out.sha256 = sha256_of(Path(chunk.path))
    return out


def rows_digest(rows: IndexRows) -> str:
    """16 hex digits of what an index holds. Its file is named by them: a new index never replaces an old one."""
    return hashlib.sha256(str(rows.dtype.itemsize).encode() + rows.tobytes()).hexdigest()[:16]
