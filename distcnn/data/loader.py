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

from distcnn.data.cache import PixelCache
from distcnn.data.fill import BadSample as BadSample
from distcnn.data.fill import Filled, Filler
from distcnn.data.order import EpochOrder, Ids
from distcnn.data.processes import Processes, result_of
from distcnn.data.readahead import ReadAhead
from distcnn.data.readers import Reader
from distcnn.data.shards import Found, SplitReader
from distcnn.data.upload import CPU, HostBuffer, Upload
from distcnn.data.views import View

MIN_CHUNK_PIXELS = 1 << 18  # decoding less than this in one task costs more in hand-offs than it gains


@dataclass(frozen=True)
class TileRequest:
    """The ids of one tile, and its place: the keys of what is random about it."""

    epoch: int
    step: int
    lane: int
    ids: Ids
    order: EpochOrder | None = field(default=None, repr=False, compare=False)  # whose: it says what comes next


@dataclass(frozen=True)
class Tile:
    """A tile on the loader's device. On a CPU `images` is a buffer that is used again: valid until the next step."""

    request: TileRequest
    images: torch.Tensor  # (n, S, S, 3) uint8 RGB
    labels: torch.Tensor  # (n,) int64
    weights: torch.Tensor  # (n,) float32: 1, or 0 for a sample that could not be read


PARTS = ("read", "decode", "resize", "wait", "collate", "transfer")


@dataclass
class LoaderStats:
    """What the loader did since it was made. Read, decode, resize are summed over threads; wait is the consumer's."""

    samples: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    resize_seconds: float = 0.0
    wait_seconds: float = 0.0
    collate_seconds: float = 0.0
    transfer_seconds: float = 0.0
    bad: list[BadSample] = field(default_factory=list)

    def seconds(self) -> dict[str, float]:
        """By part."""
        return {part: getattr(self, f"{part}_seconds") for part in PARTS}


class Loader:
    """Fills tile requests from the samples of a split.

    threads: how many read and decode at once. prefetch: steps made ahead; with 0, decoding and computing take turns,
    which on a machine without a GPU is faster than fighting over the cores. cache_shape: keep the decoded pixels of
    every sample in memory, (height, width) of them all. reduce: see `Filler`. device: where tiles go, see upload.py.
    processes: so many in place of the threads, see processes.py; they keep no pixels.
    """

    _on_host = True  # images are made in host memory, in a buffer of `_upload`

    def __init__(
        self,
        reader: Reader,
        view: View,
        seed: int,
        threads: int = 1,
        prefetch: int = 0,
        cache_shape: tuple[int, int] | None = None,
        reduce: bool = False,
        device: torch.device = CPU,
        processes: int = 0,
    ) -> None:
        self.reader, self.view, self.seed = reader, view, seed
        self.threads, self.prefetch = threads, prefetch
        self.on_bad: Callable[[BadSample], None] | None = None
        self.stats = LoaderStats()
        cache = PixelCache(len(reader), *cache_shape) if cache_shape else None
        self._filler = Filler(reader, seed, cache, reduce)
        self._processes = Processes(processes, reader, seed, reduce) if processes else None
        if self._processes:
            self.threads = processes
        alone = processes or (threads == 1 and not prefetch)
        self._pool = None if alone else ThreadPoolExecutor(threads, "decode")
        # One buffer for each step under way and one in use.
        self._upload = Upload(device, max(prefetch, 1) + 1, shared=processes > 0)

    def steps(self, requests: Iterable[Sequence[TileRequest]]) -> Iterator[list[Tile]]:
        """One list of tiles for each list of requests, in their order. Raises DataError for an index that is gone."""
        todo = iter(requests)
        first = next(todo, None)
        if first is None:
            return
        ahead = self._read_ahead(first)
        try:
            for tiles in self._pipeline(itertools.chain([first], todo)):
                yield tiles
                if ahead:
                    ahead.done(tiles[0].request.step)
        finally:
            if ahead:
                ahead.stop()

    def _read_ahead(self, requests: Sequence[TileRequest]) -> ReadAhead | None:
        """What fetches remote shards ahead, from these requests to the end of their epoch."""
        order = requests[0].order
        if order is None or not isinstance(self.reader, SplitReader) or not self.reader.remote:
            return None
        return ReadAhead(self.reader, order, [request.lane for request in requests], requests[0].step)

    def _pipeline(self, todo: Iterator[Sequence[TileRequest]]) -> Iterator[list[Tile]]:
        pending: deque[_Step] = deque()
        while True:
            for step_requests in itertools.islice(todo, max(self.prefetch, 1) - len(pending)):
                pending.append(self._begin(step_requests))
            if not pending:
                return
            tiles = self._finish(pending.popleft())
            if self.prefetch:
                for step_requests in itertools.islice(todo, 1):
                    pending.append(self._begin(step_requests))
            yield tiles

    def close(self) -> None:
        """Stop the threads and close the files."""
        for workers in (self._pool, self._processes):
            if workers is not None:
                workers.shutdown(cancel_futures=True)
        self.reader.close()

    def _begin(self, requests: Sequence[TileRequest]) -> _Step:
        started = time.perf_counter()
        ids = np.concatenate([request.ids for request in requests])
        found = self.reader.find(ids)
        epoch = requests[0].epoch
        view = self.view.at(epoch)
        buffer = self._upload.buffer(len(ids) if self._on_host else 0, view.size)
        begun = time.perf_counter()
        self.stats.collate_seconds += begun - started
        chunks = self._begin_filling(ids, found, buffer, epoch, view)
        if self._pool is None and self._processes is None:
            self.stats.wait_seconds += time.perf_counter() - begun
        return _Step(requests, ids, found, buffer, chunks)

    def _begin_filling(
        self, ids: Ids, found: Found, buffer: HostBuffer, epoch: int, view: View
    ) -> Sequence[Future[Filled] | Filled]:
        """Fill the buffer's images, in parts of a size that is worth a task."""
        images = buffer.pixels
        size = max(-(-MIN_CHUNK_PIXELS // view.size**2), -(-len(ids) // self.threads))
        parts = [slice(begin, begin + size) for begin in range(0, len(ids), size)]
        if self._processes:
            return [
                self._processes.fill(ids[part], found.part(part), buffer.address, part.start, epoch, view)
                for part in parts
            ]
        if self._pool is None:
            return [self._filler.fill(ids, found, images, epoch, view)]
        return [
            self._pool.submit(self._filler.fill, ids[part], found.part(part), images[part], epoch, view)
            for part in parts
        ]

    def _finish(self, step: _Step) -> list[Tile]:
        started = time.perf_counter()
        chunks = [result_of(chunk) if isinstance(chunk, Future) else chunk for chunk in step.chunks]
        waited = time.perf_counter()
        weights = torch.ones(len(step.ids))
        start = 0
        for filled in chunks:
            for place, bad in filled.bad:
                weights[start + place] = 0
                self.stats.bad.append(bad)
                if self.on_bad:
                    self.on_bad(bad)
            start += filled.samples
            self.stats.read_seconds += filled.read_seconds
            self.stats.decode_seconds += filled.decode_seconds
            self.stats.resize_seconds += filled.resize_seconds
        self.stats.samples += len(step.ids)
        labels = torch.from_numpy(step.found.columns["label"].astype(np.int64))
        collated = time.perf_counter()
        images, labels, weights = self._send(step.buffer, chunks, labels, weights)
        sent = time.perf_counter()
        tiles, start = [], 0
        for request in step.requests:
            part = slice(start, start + len(request.ids))
            tiles.append(Tile(request, images[part], labels[part], weights[part]))
            start = part.stop
        self.stats.wait_seconds += waited - started
        self.stats.transfer_seconds += sent - collated
        self.stats.collate_seconds += time.perf_counter() - waited - (sent - collated)
        return tiles

    def _send(self, buffer: HostBuffer, chunks: Sequence[Filled], *others: torch.Tensor) -> list[torch.Tensor]:
        """The step's images and `others` on the device."""
        return self._upload.send(buffer, *others)


@dataclass(frozen=True)
class _Step:
    """A step under way."""

    requests: Sequence[TileRequest]
    ids: Ids
    found: Found
    buffer: HostBuffer
    chunks: Sequence[Future[Filled] | Filled]


def training_requests(order: EpochOrder, lanes: Iterable[int], first_step: int = 0) -> Iterator[list[TileRequest]]:
    """The requests of some lanes from `first_step` to the end of the epoch. Nothing before it is touched."""
    lanes = list(lanes)
    for step in range(first_step, order.steps):
        yield [TileRequest(order.epoch, step, lane, order.tile(step, lane), order) for lane in lanes]
