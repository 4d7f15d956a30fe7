"""From a tar to its samples, from a sample id to its bytes.

Beside each shard lies an index: one structured numpy array (a .npy file, mapped into memory), a row a good sample, in
the order of the tar. Quarantined samples have no row: N is what the indexes say.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.manifest import Shard, Split
from distcnn.data.order import sample_of
from distcnn.data.sources import is_remote
from distcnn.data.tar import Member, iterate_members
from distcnn.errors import DataError

if TYPE_CHECKING:
    from distcnn.data.nodecache import NodeCache

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
OTHER_MEMBERS = ("cls", "json")
READ_MEMBERS = frozenset(IMAGE_MEMBERS + OTHER_MEMBERS)  # nothing else in a shard is ever read, so none is unpickled
MAX_SMALL_BYTES = 1 << 20  # of a .cls or .json member
MAX_KEY_BYTES = 1024  # every row of an index has room for the longest key
OPEN_FILES = 128
OPEN_INDEXES = 4096  # each is a mapping of memory, and the kernel grants a process 65,530 of them

IndexRows = NDArray[np.void]


@dataclass(frozen=True)
class TarSample:
    """The members of one sample: neighbours in the tar that share a key, by extension (lower case)."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def image(self) -> Member | None:
        """The image member; None if there is none."""
        return next((self.members[name] for name in IMAGE_MEMBERS if name in self.members), None)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member by webdataset's rule: the extension begins at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def samples_in(path: Path) -> Iterator[TarSample]:
    """The samples of a local tar in their order. Raises DataError: see `samples_from` and `tar.members_from`."""
    return samples_from(iterate_members(path), str(path))


def samples_from(members: Iterable[Member], name: str) -> Iterator[TarSample]:
    """The samples that the `members` of shard `name` make; those that are neither image, cls nor json are passed over.

    Raises DataError naming shard and key for a key that comes twice, whether its members are interleaved with
    another's or it is repeated.
    """
    seen: set[str] = set()
    current: TarSample | None = None
    for member in members:
        key, extension = split_name(member.name)
        if extension not in READ_MEMBERS or not key or key[-1] == "/":
            continue
        if current is None or key != current.key:
            if current is not None:
                yield current
            if key in seen:
                raise DataError(
                    f"shard {name}: key {key!r} comes twice or its members are not neighbours:"
                    " write the shard again with the members of each sample together and keys unique"
                )
            if len(key) > MAX_KEY_BYTES // 4 and len(key.encode("utf-8", "surrogateescape")) > MAX_KEY_BYTES:
                raise DataError(f"shard {name}: key {key[:40]!r}... is longer than {MAX_KEY_BYTES} bytes")
            seen.add(key)
            current = TarSample(key)
        if extension in current.members:
            raise DataError(f"shard {name}: key {key!r} comes twice: it has two .{extension} members")
        current.members[extension] = member
    if current is not None:
        yield current


def index_dtype(key_bytes: int) -> np.dtype[np.void]:
    """A row of an index. Offsets and sizes in bytes within the tar; width and height in pixels, 0 = not known."""
    fields = [("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("width", "<i4"), ("height", "<i4")]
    return np.dtype([*fields, ("key", f"S{max(key_bytes, 1)}")])


def make_index(rows: list[tuple[int, int, int, int, int, str]]) -> IndexRows:
    """(n,) rows of `index_dtype` from (offset, size, label, width, height, key) tuples."""
    encoded = [(*row[:5], row[5].encode("utf-8", "surrogateescape")) for row in rows]
    longest = max((len(row[5]) for row in encoded), default=1)
    return np.array(encoded, dtype=index_dtype(longest))


def load_index(path: Path, shard: Shard) -> IndexRows:
    """The memory-mapped index of a shard. Raises DataError if it is missing, damaged or of another shard."""
    try:
        rows: Any = np.load(path, mmap_mode="r" if shard.samples else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"index {path} of shard {shard.name} cannot be read ({error}): index the set again") from error
    if (
        not isinstance(rows, np.ndarray)  # np.load opens zip files too
        or rows.dtype != index_dtype(rows.dtype.itemsize - index_dtype(1).itemsize + 1)
        or rows.shape != (shard.samples,)
    ):
        raise DataError(f"index {path} is not the one of shard {shard.name} in dataset.json: index the set again")
    return rows


def resolve_local(root: Path, shard: Shard) -> Path:
    """Where the tar of a shard lies on this machine. Raises DataError for a URL."""
    if "://" in shard.name:
        raise DataError(f"shard {shard.name} is remote and has not been fetched")
    return root / shard.name


class _Handle:
    """An open file descriptor, closed when the last thread that reads it has let go."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class Found:
    """Where n samples lie: the numbers of their shards (n,) and their index rows (n,) without the keys."""

    shards: NDArray[np.int64]
    columns: IndexRows

    def part(self, which: slice | NDArray[np.int64]) -> Found:
        """The same of some of the samples."""
        return Found(self.shards[which], self.columns[which])


COLUMNS = np.dtype([(name, index_dtype(1)[name]) for name in ("offset", "size", "label", "width", "height")])
_RAW = np.dtype((np.void, COLUMNS.itemsize))  # a row without its key as one block of bytes


def _groups(shards: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(shard number, positions that have it) for each shard in `shards`."""
    order = np.argsort(shards, kind="stable")
    ordered = shards[order]
    cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    for where in np.split(order, cuts) if len(order) else ():
        yield int(shards[where[0]]), where


class SplitReader:
    """Bytes, labels and keys of a split by sample id. Safe to use from many threads.

    Remote shards are fetched whole when they are first read, into `cache` (by default the node's, see nodecache.py).
    """

    def __init__(self, root: Path, split: Split, cache: NodeCache | None = None) -> None:
        self.root, self.split, self._cache = root, split, cache
        self.counts = np.array([shard.samples for shard in split.shards], dtype=np.int64)  # (S,)
        self._first_id = np.concatenate([[0], np.cumsum(self.counts)])  # (S + 1,)
        self._indexes: dict[int, IndexRows] = {}
        self._files: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        """What is open here is not open in another process."""
        return SplitReader, (self.root, self.split)

    def __len__(self) -> int:
        return int(self._first_id[-1])

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard numbers, rows within the shard) of sample ids, both (n,) int64."""
        ids = sample_of(ids)
        shards = np.searchsorted(self._first_id, ids, side="right") - 1
        return shards, ids - self._first_id[shards]

    def find(self, ids: NDArray[np.int64]) -> Found:
        """Where samples lie and what the indexes say of them."""
        shards, rows = self.locate(ids)
        columns = np.empty(len(ids), dtype=COLUMNS)
        raw = columns.view(_RAW)
        for shard, where in _groups(shards):
            index = self.index(shard)
            raw[where] = np.ndarray(len(index), _RAW, index, strides=index.strides)[rows[where]]
        return Found(shards, columns)

    def labels(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64 labels, -1 where a sample has none."""
        return self.find(ids).columns["label"].astype(np.int64)

    def all_labels(self) -> NDArray[np.int64]:
        """(N,) int64 labels of the whole split; every index is read for it."""
        labels = [self.index(shard)["label"] for shard in range(len(self.split.shards))]
        return np.concatenate([np.empty(0, dtype=np.int64), *labels]).astype(np.int64)

    def keys(self, ids: NDArray[np.int64]) -> list[tuple[str, str]]:
        """(shard name, key) of each id, to name samples in messages."""
        shards, rows = self.locate(ids)
        return [
            (self.split.shards[s].name, self.index(int(s))["key"][r].decode("utf-8", "surrogateescape"))
            for s, r in zip(shards, rows, strict=True)
        ]

    def read(self, ids: NDArray[np.int64], found: Found | None = None) -> list[bytes]:
        """The encoded images, in the order of `ids`. Raises DataError naming shard and key of what cannot be read."""
        found = found or self.find(ids)
        out: list[bytes] = [b""] * len(ids)
        offsets, sizes = found.columns["offset"].tolist(), found.columns["size"].tolist()
        for shard, where in _groups(found.shards):
            file = self._open(shard)  # held here, so that it stays open even if another thread drops it from the cache
            for slot in where.tolist():
                try:
                    out[slot] = data = os.pread(file.descriptor, sizes[slot], offsets[slot])
                except OSError as error:
                    name, key = self.keys(ids[slot : slot + 1])[0]
                    raise DataError(f"shard {name}, sample {key!r}: {error.strerror or error}") from error
                if len(data) != sizes[slot]:
                    name, key = self.keys(ids[slot : slot + 1])[0]
                    raise DataError(f"shard {name} ends within sample {key!r}: it was cut after it was indexed")
        return out

    def descriptors(self, found: Found) -> tuple[NDArray[np.int64], list[object]]:
        """(n,) file descriptors of the samples' shards, -1 where one cannot be opened; and what keeps them open."""
        descriptors, handles = np.full(len(found.shards), -1, dtype=np.int64), list[object]()
        for shard, where in _groups(found.shards):
            with contextlib.suppress(DataError):  # `read` says what is wrong with it
                file = self._open(shard)
                handles.append(file)
                descriptors[where] = file.descriptor
        return descriptors, handles

    def index(self, shard: int) -> IndexRows:
        """The rows of shard number `shard`."""
        rows = self._indexes.get(shard)
        if rows is None:
            entry = self.split.shards[shard]
            rows = np.asarray(load_index(self.root / entry.index, entry))  # without numpy.memmap's Python around it
            with self._lock:
                while len(self._indexes) >= OPEN_INDEXES:
                    del self._indexes[next(iter(self._indexes))]
                self._indexes[shard] = rows
        return rows

    @property
    def remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return any(is_remote(shard.name) for shard in self.split.shards)

    @property
    def cache(self) -> NodeCache:
        """Where remote shards are kept. Raises UserError if there is no place for them."""
        with self._lock:
            if self._cache is None:
                from distcnn.data.nodecache import NodeCache

                self._cache = NodeCache()
            return self._cache

    def release(self, shards: Iterable[int]) -> None:
        """Close the files of shards that are not read again for a while: a remote one may then be evicted."""
        with self._lock:
            for shard in shards:
                self._files.pop(shard, None)

    def close(self) -> None:
        """Close the files and drop the indexes; the reader can be used again."""
        with self._lock:
            self._files.clear()
            self._indexes.clear()
            if self._cache is not None:
                self._cache.need({})

    def _open(self, shard: int) -> _Handle:
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        entry = self.split.shards[shard]
        if is_remote(entry.name):
            opened = _Handle(self.cache.open(entry))
        else:
            path = resolve_local(self.root, entry)
            try:
                opened = _Handle(os.open(path, os.O_RDONLY))
            except OSError as error:
                raise DataError(f"cannot open shard {path}: {error.strerror or error}") from error
        with self._lock:
            self._files[shard] = opened
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return opened
