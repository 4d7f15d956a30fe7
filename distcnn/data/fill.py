"""From sample ids to pixels in slots: read, decode, cut, scale, in loader threads.

Python costs a few microseconds a sample here; whatever can be done for a chunk of samples at once is. A sample that
cannot be had leaves a black slot and its name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distcnn.data.cache import PixelCache
from distcnn.data.decode import (
    DecodeError,
    Pixels,
    decode,
    decode_into,
    jpeg_shape,
    plain_header,
)
from distcnn.data.order import Ids
from distcnn.data.readers import Reader
from distcnn.data.resize import Group, resize_into
from distcnn.data.shards import Found, SplitReader
from distcnn.data.turbojpeg import Decoder, make_decoder
from distcnn.data.views import View, reduction
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
        self.group = Group()

    @cached_property
    def decoder(self) -> Decoder | None:
        """Made when it is first wanted: it may have to be compiled."""
        return make_decoder()


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
        places: Sequence[int] = range(len(ids))
        if self.cache is None:
            left = np.flatnonzero(~self._fill_plain(ids, found, slots, epoch, view, filled))
            ids, found, places = ids[left], found.part(left), left.tolist()
        if len(ids):
            started = _clock()
            sources = self._read(ids, found, cached)
            filled.read_seconds += _clock() - started
            if view.kind == "none":
                self._fill_whole(ids, sources, slots, places, filled)
            else:
                self._fill_boxes(ids, found, sources, slots, places, epoch, view, filled)
        return filled

    def _fill_plain(
        self, ids: Ids, found: Found, slots: Pixels, epoch: int, view: View, filled: Filled
    ) -> NDArray[np.bool_]:
        """Fill what needs no interpreter, see turbojpeg.py; which of the places that are, (n,) bool.

        All else, and whatever shows a defect, is left to the slower way, which knows what to say of it.
        """
        done = np.zeros(len(ids), dtype=np.bool_)
        if not isinstance(self.reader, SplitReader):
            return done
        decoder = self._thread.decoder
        if decoder is None or decoder.is_idle:
            return done
        begun = _clock()
        descriptors, held = self.reader.descriptors(found)
        entries = decoder.read(found.columns, descriptors)
        del held
        filled.read_seconds = _clock() - begun
        entries["slot"] = np.arange(len(entries))
        plain = np.flatnonzero(entries["height"] > 0)
        entries = entries[plain]
        heights, widths = entries["height"], entries["width"]
        if view.kind == "none":
            nothing = np.zeros_like(heights)
            boxes = np.stack([nothing, nothing, heights, widths], axis=1)
        else:
            boxes = view.boxes(ids[plain], heights, widths, self.seed, epoch)
        done[plain], filled.resize_seconds = decoder.fill(entries, boxes, slots)
        filled.decode_seconds = _clock() - begun - filled.read_seconds - filled.resize_seconds
        return done

    def _read(self, ids: Ids, found: Found, cached: NDArray[np.bool_] | None) -> list[_Source]:
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

    def _fill_whole(
        self, ids: Ids, sources: list[_Source], slots: Pixels, places: Sequence[int], filled: Filled
    ) -> None:
        """Images that have the size of the slots are decoded straight into them; others are scaled whole."""
        started = _clock()
        header = plain_header(slots.shape[1], slots.shape[1])
        for sample, place, source in zip(ids.tolist(), places, sources, strict=True):
            slot = slots[place]
            try:
                if isinstance(source, bytes):
                    pixels = decode_into(source, slot, header)
                    if self.cache is not None:
                        self.cache.put(sample, pixels)
                elif isinstance(source, str):
                    raise DecodeError(source)
                else:
                    pixels = source
            except DecodeError as error:
                self._give_up(sample, place, slot, str(error), filled)
                continue
            if pixels is not slot:
                resize_into(slot, pixels, (0, 0, pixels.shape[0], pixels.shape[1]))
        filled.decode_seconds += _clock() - started

    def _fill_boxes(
        self,
        ids: Ids,
        found: Found,
        sources: list[_Source],
        slots: Pixels,
        places: Sequence[int],
        epoch: int,
        view: View,
        filled: Filled,
    ) -> None:
        """A few images are decoded and then scaled into their slots, while they are in the processor's cache."""
        group = self._thread.group
        group.forget()
        begun = _clock()
        shapes = self._shapes(ids, found, sources)
        heights_widths = np.array(shapes, dtype=np.int64).reshape(-1, 2)
        boxes = view.boxes(ids, heights_widths[:, 0], heights_widths[:, 1], self.seed, epoch).tolist()
        for sample, place, source, shape, box in zip(ids.tolist(), places, sources, shapes, boxes, strict=True):
            try:
                if isinstance(source, str):
                    raise DecodeError(source)
                if isinstance(source, bytes):
                    factor = reduction(box, view.size) if self.reduce else 1
                    if factor > 1:
                        box = [value // factor for value in box]
                    pixels = group.decode(place, source, shape, factor, box)
                    if self.cache is not None:
                        self.cache.put(sample, pixels)
                else:
                    group.copy(place, source, box)
            except DecodeError as error:
                self._give_up(sample, place, slots[place], str(error), filled)
            if group.full or place == places[-1]:
                decoded = _clock()
                group.scale_into(slots)
                filled.decode_seconds += decoded - begun
                begun = _clock()
                filled.resize_seconds += begun - decoded

    def _shapes(self, ids: Ids, found: Found, sources: list[_Source]) -> list[tuple[int, int]]:
        """The (height, width) of each source. What is no JPEG file is decoded for it, or replaced by its defect."""
        shapes = []
        said = zip(found.columns["height"].tolist(), found.columns["width"].tolist(), strict=True)
        for place, (source, size) in enumerate(zip(sources, said, strict=True)):
            shape = jpeg_shape(source, size) if isinstance(source, bytes) else None
            if shape is None:
                if isinstance(source, bytes):
                    try:
                        sources[place] = source = decode(source)
                        if self.cache is not None:
                            self.cache.put(int(ids[place]), source)
                    except DecodeError as error:
                        sources[place] = source = str(error)
                shape = (1, 1) if isinstance(source, str) else (source.shape[0], source.shape[1])
            shapes.append(shape)
        return shapes

    def _give_up(self, sample: int, place: int, slot: Pixels, reason: str, filled: Filled) -> None:
        slot[:] = 0
        shard, key = self.reader.keys(np.array([sample]))[0]
        filled.bad.append((place, BadSample(shard, key, reason)))


_Source = bytes | Pixels | str  # encoded, decoded, or why neither
