"""Ids in, uint8 tiles out: threads that read, decode and scale into preallocated buffers.

The loader does not know what order is: it is handed requests (which ids make which tile) and fills them, some steps
ahead. It keeps no position. A sample that cannot be decoded keeps its slot with weight 0 and is reported by name.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from distcnn.data.decode import DecodeError, Pixels, decode
from distcnn.data.order import EpochOrder, Ids
from distcnn.data.shards import SplitReader
from distcnn.data.views import View, resize_into
from distcnn.errors import DataError

MIN_CHUNK_PIXELS = 1 << 18  # decoding less than this in one task costs more in hand-offs than it gains


@dataclass(frozen=True)
class TileRequest:
    """The ids of one tile, and its place: the keys of what is random about it."""

    epoch: int
    step: int
    lane: int
    ids: Ids


@dataclass(frozen=True)
class Tile:
    """A tile ready for the device. `images` is a buffer that is used again: valid until the next step is asked for."""

    request: TileRequest
    images: torch.Tensor  # (n, S, S, 3) uint8 RGB
    labels: torch.Tensor  # (n,) int64
    weights: torch.Tensor  # (n,) float32: 1, or 0 for a sample that could not be read


@dataclass(frozen=True)
class BadSample:
    """A sample found bad at run time."""

    shard: str
    key: str
    reason: str


@dataclass
class LoaderStats:
    """What the loader did since it was made. Seconds are summed over threads, but `wait` is the consumer's."""

    samples: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    bad: list[BadSample] = field(default_factory=list)


class Loader:
    """Fills tile requests from the samples of a split.

    threads: how many read and decode at once. prefetch: steps made ahead; with 0, decoding and computing take turns,
    which on a machine without a GPU is faster than fighting over the cores. cache: keep the decoded pixels of every
    sample in memory (images of one size only).
    """

    def __init__(
        self,
        reader: SplitReader,
        view: View,
        seed: int,
        threads: int = 1,
        prefetch: int = 0,
        cache_shape: tuple[int, int] | None = None,
    ) -> None:
        self.reader, self.view, self.seed = reader, view, seed
        self.threads, self.prefetch = threads, prefetch
        self.on_bad: Callable[[BadSample], None] | None = None
        self.stats = LoaderStats()
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 or prefetch else None
        self._buffers: list[Pixels] = []
        self._turn = 0
        self._cache: NDArray[np.uint8] | None = None
        if cache_shape is not None:
            self._cache = np.empty((len(reader), *cache_shape, 3), dtype=np.uint8)
            self._cached = np.zeros(len(reader), dtype=bool)

    def steps(self, requests: Iterable[Sequence[TileRequest]]) -> Iterator[list[Tile]]:
        """One list of tiles for each list of requests, in their order. Raises DataError for a shard that is gone."""
        todo = iter(requests)
        pending: deque[_Step] = deque()
        while True:
            for step_requests in itertools.islice(todo, max(self.prefetch, 1) - len(pending)):
                pending.append(self._begin(step_requests))
            if not pending:
                return
            started = time.perf_counter()
            tiles = self._finish(pending.popleft())
            self.stats.wait_seconds += time.perf_counter() - started
            if self.prefetch:
                for step_requests in itertools.islice(todo, 1):
                    pending.append(self._begin(step_requests))
            yield tiles

    def close(self) -> None:
        """Stop the threads and close the files."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self.reader.close()

    def _begin(self, requests: Sequence[TileRequest]) -> _Step:
        ids = np.concatenate([request.ids for request in requests])
        images = self._buffer(len(ids))
        epoch = requests[0].epoch
        size = max(-(-MIN_CHUNK_PIXELS // self.view.size**2), -(-len(ids) // self.threads))
        chunks: list[Future[_Filled] | _Filled] = []
        if self._pool is None:
            chunks = [self._fill(ids, images, epoch)]
        else:
            for begin in range(0, len(ids), size):
                part = slice(begin, begin + size)
                chunks.append(self._pool.submit(self._fill, ids[part], images[part], epoch))
        return _Step(requests, ids, images, chunks)

    def _finish(self, step: _Step) -> list[Tile]:
        weights = torch.ones(len(step.ids))
        start = 0
        for chunk in step.chunks:
            filled = chunk.result() if isinstance(chunk, Future) else chunk
            for place, bad in filled.bad:
                weights[start + place] = 0
                self.stats.bad.append(bad)
                if self.on_bad:
                    self.on_bad(bad)
            start += filled.samples
            self.stats.read_seconds += filled.read_seconds
            self.stats.decode_seconds += filled.decode_seconds
        self.stats.samples += len(step.ids)
        labels = torch.from_numpy(self.reader.labels(step.ids))
        images = torch.from_numpy(step.images)
        tiles, start = [], 0
        for request in step.requests:
            part = slice(start, start + len(request.ids))
            tiles.append(Tile(request, images[part], labels[part], weights[part]))
            start = part.stop
        return tiles

    def _fill(self, ids: Ids, out: Pixels, epoch: int) -> _Filled:
        """Decode `ids` into `out` (n, S, S, 3)."""
        if self._cache is not None and self.view.kind == "none" and self._cached[ids].all():
            np.take(self._cache, ids, axis=0, out=out)
            return _Filled(len(ids))
        started = time.perf_counter()
        encoded = self._read(ids)
        read_at = time.perf_counter()
        pixels: list[Pixels | None] = [None] * len(ids)
        bad: list[tuple[int, BadSample]] = []
        for place, data in enumerate(encoded):
            try:
                if isinstance(data, str):
                    raise DecodeError(data)
                pixels[place] = data if isinstance(data, np.ndarray) else self._decode(data, int(ids[place]))
            except DecodeError as error:
                shard, key = self.reader.keys(ids[place : place + 1])[0]
                bad.append((place, BadSample(shard, key, str(error))))
        self._place(ids, pixels, out, epoch)
        return _Filled(len(ids), bad, read_at - started, time.perf_counter() - read_at)

    def _read(self, ids: Ids) -> list[bytes | Pixels | str]:
        """Encoded bytes, or cached pixels, or why there are none."""
        out: list[bytes | Pixels | str] = [b""] * len(ids)
        wanted = np.arange(len(ids))
        if self._cache is not None:
            cached = self._cached[ids]
            for place in np.flatnonzero(cached).tolist():
                out[place] = self._cache[ids[place]]
            wanted = np.flatnonzero(~cached)
        try:
            for place, data in zip(wanted.tolist(), self.reader.read(ids[wanted]), strict=True):
                out[place] = data
        except DataError:  # find out which
            for missing in wanted.tolist():
                try:
                    out[missing] = self.reader.read(ids[missing : missing + 1])[0]
                except DataError as error:
                    out[missing] = str(error)
        return out

    def _decode(self, data: bytes, sample: int) -> Pixels:
        pixels = decode(data)
        if self._cache is not None:
            if pixels.shape != self._cache.shape[1:]:
                raise DecodeError(f"{pixels.shape[1]}x{pixels.shape[0]} px, but dataset.json says all are of one size")
            self._cache[sample] = pixels
            self._cached[sample] = True
        return pixels

    def _place(self, ids: Ids, pixels: list[Pixels | None], out: Pixels, epoch: int) -> None:
        """Cut and scale each image into its slot; a missing one is black."""
        shapes = np.array([(1, 1) if p is None else p.shape[:2] for p in pixels], dtype=np.int64).reshape(-1, 2)
        boxes = None
        if self.view.kind != "none":
            boxes = self.view.boxes(ids, shapes[:, 0], shapes[:, 1], self.seed, epoch)
        for place, image in enumerate(pixels):
            if image is None:
                out[place] = 0
            elif boxes is None and image.shape[:2] == tuple(out.shape[1:3]):
                out[place] = image
            else:
                whole = np.array([0, 0, *image.shape[:2]])
                resize_into(out[place], image, whole if boxes is None else boxes[place])

    def _buffer(self, samples: int) -> Pixels:
        """(samples, S, S, 3) uint8, from a ring with one buffer for each step under way and one in use."""
        slots = max(self.prefetch, 1) + 1
        slot = self._turn % slots
        if len(self._buffers) < slots:
            self._buffers.append(np.empty((0,), dtype=np.uint8))
        if len(self._buffers[slot]) < samples:
            self._buffers[slot] = np.empty((samples, self.view.size, self.view.size, 3), dtype=np.uint8)
        self._turn += 1
        return self._buffers[slot][:samples]


@dataclass(frozen=True)
class _Filled:
    """What one task did."""

    samples: int
    bad: list[tuple[int, BadSample]] = field(default_factory=list)
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class _Step:
    """A step under way."""

    requests: Sequence[TileRequest]
    ids: Ids
    images: Pixels
    chunks: Sequence[Future[_Filled] | _Filled]


def training_requests(order: EpochOrder, lanes: Iterable[int], first_step: int = 0) -> Iterator[list[TileRequest]]:
    """The requests of some lanes from `first_step` to the end of the epoch. Nothing before it is touched."""
    lanes = list(lanes)
    for step in range(first_step, order.steps):
        yield [TileRequest(order.epoch, step, lane, order.tile(step, lane)) for lane in lanes]
