"""From sample ids to pixels in slots: read, decode, cut, scale, in loader threads.

Python costs a few microseconds a sample here; whatever can be done for a chunk of samples at once is. A sample that
cannot be had leaves a black slot and its name.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np

from distcnn.data.cache import PixelCache
from distcnn.data.decode import (
    DecodeError,
    Pixels,
    Scratch,
    decode,
    decode_into,
    decode_reduced,
    jpeg_shape,
    plain_header,
)
from distcnn.data.order import Ids
from distcnn.data.readers import Reader
from distcnn.data.shards import Found
from distcnn.data.views import View, reduction, resize_into
from distcnn.errors import DataError

_clock = time.perf_counter


@dataclass(frozen=True)
class BadSample:
    """A sample found bad at run time."""

    shard: str
    key: str
    reason: str


@dataclass
class Filled:
    """What filling a chunk took, in seconds, and which of its places stayed black."""

    samples: int
    bad: list[tuple[int, BadSample]] = field(default_factory=list)
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    resize_seconds: float = 0.0


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


class Filler:
    """Fills slots (S, S, 3) with views of samples. Safe to use from many threads.

    reduce: images much larger than the view are scaled down while decoding (see `decode_reduced`). This changes
    pixels a little, so it must follow from the data set, not from the machine.
    """

    def __init__(self, reader: Reader, seed: int, cache: PixelCache | None, reduce: bool) -> None:
        self.reader, self.seed, self.cache, self.reduce = reader, seed, cache, reduce
        self._thread = _PerThread()

    def fill(self, ids: Ids, found: Found, slots: Pixels, epoch: int, view: View) -> Filled:
        """Fill `slots` (n, S, S, 3) with this view of the samples `ids`, which lie where `found` says."""
        filled = Filled(len(ids))
        cached = None if self.cache is None else self.cache.has(ids)
        as_they_are = view.kind == "none" and self.cache is not None and self.cache.shape == slots.shape[1:]
        if self.cache is not None and cached is not None and cached.all() and as_they_are:
            self.cache.take(ids, slots)
            return filled
        started = _clock()
        sources = self._read(ids, found, cached)
        filled.read_seconds = _clock() - started
        if view.kind == "none":
            self._fill_whole(ids, sources, slots, filled)
        else:
            self._fill_boxes(ids, sources, slots, epoch, view, filled)
        return filled

    def _read(self, ids: Ids, found: Found, cached: np.ndarray[tuple[int], np.dtype[np.bool_]] | None) -> list[_Source]:
        """Encoded bytes, cached pixels, or why there are neither."""
        if self.cache is None or cached is None or not cached.any():
            return self._read_bytes(ids, found)
        sources: list[_Source] = [self.cache.get(sample) for sample in ids.tolist()]
        missing = np.flatnonzero(~cached)
        if len(missing):
            some = Found(found.shards[missing], found.columns[missing])
            for place, data in zip(missing.tolist(), self._read_bytes(ids[missing], some), strict=True):
                sources[place] = data
        return sources

    def _read_bytes(self, ids: Ids, found: Found) -> list[_Source]:
        try:
            return list(self.reader.read(ids, found))
        except DataError:  # one of them, perhaps: find out which
            sources: list[_Source] = []
            for place in range(len(ids)):
                part = slice(place, place + 1)
                try:
                    sources += self.reader.read(ids[part], found.part(part))
                except DataError as error:
                    sources.append(str(error))
            return sources

    def _fill_whole(self, ids: Ids, sources: list[_Source], slots: Pixels, filled: Filled) -> None:
        """Images that have the size of the slots are decoded straight into them; others are scaled whole."""
        started = _clock()
        header = plain_header(slots.shape[1], slots.shape[1])
        for place, (source, slot) in enumerate(zip(sources, slots, strict=True)):
            try:
                if isinstance(source, bytes):
                    pixels = decode_into(source, slot, header)
                    if self.cache is not None:
                        self.cache.put(int(ids[place]), pixels)
                elif isinstance(source, str):
                    raise DecodeError(source)
                else:
                    pixels = source
            except DecodeError as error:
                self._give_up(ids, place, slot, str(error), filled)
                continue
            if pixels is not slot:
                resize_into(slot, pixels, (0, 0, pixels.shape[0], pixels.shape[1]))
        filled.decode_seconds = _clock() - started

    def _fill_boxes(
        self, ids: Ids, sources: list[_Source], slots: Pixels, epoch: int, view: View, filled: Filled
    ) -> None:
        """Each image is scaled into its slot as soon as it is decoded, while it is in the processor's cache."""
        started = _clock()
        shapes = self._shapes(ids, sources)
        heights_widths = np.array(shapes, dtype=np.int64).reshape(-1, 2)
        boxes = view.boxes(ids, heights_widths[:, 0], heights_widths[:, 1], self.seed, epoch).tolist()
        filled.decode_seconds = _clock() - started
        for place, (source, slot, shape, box) in enumerate(zip(sources, slots, shapes, boxes, strict=True)):
            before = _clock()
            factor = 1
            try:
                if isinstance(source, str):
                    raise DecodeError(source)
                if isinstance(source, bytes):
                    factor = reduction(box, view.size) if self.reduce else 1
                    pixels = decode_reduced(source, shape, factor, self._thread.scratch)
                    self._keep(int(ids[place]), pixels)
                else:
                    pixels = source
            except DecodeError as error:
                self._give_up(ids, place, slot, str(error), filled)
                continue
            decoded = _clock()
            resize_into(slot, pixels, [value // factor for value in box] if factor > 1 else box)
            filled.decode_seconds += decoded - before
            filled.resize_seconds += _clock() - decoded

    def _shapes(self, ids: Ids, sources: list[_Source]) -> list[tuple[int, int]]:
        """The (height, width) of each source. What is no JPEG file is decoded for it, or replaced by its defect."""
        shapes = []
        for place, source in enumerate(sources):
            shape = jpeg_shape(source) if isinstance(source, bytes) else None
            if shape is None:
                if isinstance(source, bytes):
                    try:
                        sources[place] = source = decode(source)
                        self._keep(int(ids[place]), source)
                    except DecodeError as error:
                        sources[place] = source = str(error)
                shape = (1, 1) if isinstance(source, str) else (source.shape[0], source.shape[1])
            shapes.append(shape)
        return shapes

    def _keep(self, sample: int, pixels: Pixels) -> None:
        if self.cache is not None:
            self.cache.put(sample, pixels)

    def _give_up(self, ids: Ids, place: int, slot: Pixels, reason: str, filled: Filled) -> None:
        slot[:] = 0
        shard, key = self.reader.keys(ids[place : place + 1])[0]
        filled.bad.append((place, BadSample(shard, key, reason)))


_Source = bytes | Pixels | str  # encoded, decoded, or why neither
