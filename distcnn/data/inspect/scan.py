"""One pass over all images: what is kept of each are some numbers, a hash and a 16x16 thumbnail.

Shapes: n images of a chunk, N of the set, S the side of the canvas that every image is scaled to.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from distcnn.console import Console
from distcnn.data.decode import FORMATS, JPEG_MAGIC, DecodeError, Pixels, decode
from distcnn.data.inspect.near import THUMB, perceptual_hash
from distcnn.data.manifest import Manifest
from distcnn.data.parallel import SILENT, run_jobs
from distcnn.data.prepare.stats import Sums
from distcnn.data.sweep import Chunk, chunks_of

CANVAS = 32  # S
BYTES_FOR_PROCESSES = 8 << 20  # below this, starting processes takes longer than the work
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
PNG_COLORS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray + alpha", 6: "RGBA"}


@dataclass(frozen=True)
class Columns:
    """What is known of each image, (N,) each: where it is, what it is, how it looks."""

    split: NDArray[np.int16]
    shard: NDArray[np.int32]
    row: NDArray[np.int64]
    label: NDArray[np.int32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    bytes: NDArray[np.int64]
    brightness: NDArray[np.float32]  # mean luma, 0 to 1
    gray: NDArray[np.bool_]  # no colour to be seen
    digest: NDArray[np.void]  # blake2b of the encoded image, 16 bytes
    hash: NDArray[np.uint64]  # perceptual
    thumb: NDArray[np.uint8]  # (N, 16, 16) luma

    def __len__(self) -> int:
        return len(self.split)


@dataclass
class Measured:
    """Columns of the good images of a chunk, sums over them, and the bad ones as (place in the chunk, reason)."""

    columns: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    formats: Counter[tuple[str, str]] = field(default_factory=Counter)
    sums: Sums = field(default_factory=Sums)
    canvas_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros((CANVAS, CANVAS, 3)))
    bad: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Scan:
    """The whole set measured. By split: pixel sums, (format, channels) counts, and the mean image (S, S, 3), 0 to 255.

    `bad` are (split, shard name, key, reason) of images that the set counts and that cannot be decoded.
    """

    columns: Columns
    sums: dict[str, Sums]
    formats: dict[str, Counter[tuple[str, str]]]
    mean_image: dict[str, NDArray[np.float64]]
    bad: list[tuple[str, str, str, str]]


def scan(root: Path, manifest: Manifest, workers: int = 0, console: Console = SILENT) -> Scan:
    """Measure every image of a set. Raises DataError for indexes and shards that cannot be read."""
    chunks = chunks_of(root, manifest)
    if sum(int(chunk.rows["size"].sum()) for chunk in chunks) < BYTES_FOR_PROCESSES:
        workers = 1
    results = run_jobs(measure, chunks, "images", [len(chunk.rows) for chunk in chunks], workers, console)
    names = list(manifest.splits)
    sums = {name: Sums() for name in names}
    formats: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in names}
    means = {name: np.zeros((CANVAS, CANVAS, 3)) for name in names}
    bad: list[tuple[str, str, str, str]] = []
    for chunk, result in zip(chunks, results, strict=True):
        result.columns["split"] = np.full(len(result.columns["row"]), names.index(chunk.split), dtype=np.int16)
        sums[chunk.split].merge(result.sums)
        formats[chunk.split] += result.formats
        means[chunk.split] += result.canvas_sum
        shard = manifest.splits[chunk.split].shards[chunk.shard].name
        bad += [(chunk.split, shard, chunk.key(place), reason) for place, reason in result.bad]
    columns = Columns(**{f.name: _joined(results, f.name) for f in fields(Columns)})
    for name in names:
        means[name] /= max(1, int((columns.split == names.index(name)).sum()))
    return Scan(columns, sums, formats, means, bad)


def _joined(results: list[Measured], name: str) -> Any:
    """A column of all chunks; one after the other they are let go of, so that the set is not held twice."""
    return np.concatenate([result.columns.pop(name) for result in results])


def measure(chunk: Chunk) -> Measured:
    """Decode and measure the images of one chunk."""
    out = Measured()
    places: list[int] = []
    sizes: list[tuple[int, int]] = []
    digests: list[bytes] = []
    canvas = np.empty((len(chunk.rows), CANVAS, CANVAS, 3), dtype=np.uint8)
    for place, data in chunk.images():
        try:
            pixels = decode(data)
        except DecodeError as error:
            out.bad.append((place, str(error)))
            continue
        canvas[len(places)] = _on_canvas(pixels)
        places.append(place)
        sizes.append((pixels.shape[1], pixels.shape[0]))
        digests.append(hashlib.blake2b(data, digest_size=16).digest())
        out.formats[kind_of(data)] += 1
        out.sums.add(pixels)
    out.sums.settle()
    out.columns = _columns(chunk, places, sizes, digests, canvas[: len(places)])
    out.canvas_sum = canvas[: len(places)].sum(axis=0, dtype=np.float64)
    return out


def _columns(
    chunk: Chunk, places: list[int], sizes: list[tuple[int, int]], digests: list[bytes], canvas_nSSC: Pixels
) -> dict[str, NDArray[np.generic]]:
    rows = chunk.rows[places]
    luma = canvas_nSSC @ LUMA  # (n, S, S) float32, 0 to 255
    step = CANVAS // THUMB
    thumb = luma.reshape(-1, THUMB, step, THUMB, step).mean(axis=(2, 4))
    low, high = canvas_nSSC.min(axis=3), canvas_nSSC.max(axis=3)
    return {
        "shard": np.full(len(places), chunk.shard, dtype=np.int32),
        "row": np.array(places, dtype=np.int64) + chunk.first,
        "label": rows["label"].astype(np.int32),
        "width": np.array([width for width, _ in sizes], dtype=np.int32),
        "height": np.array([height for _, height in sizes], dtype=np.int32),
        "bytes": rows["size"].astype(np.int64),
        "brightness": (luma.mean(axis=(1, 2)) / 255).astype(np.float32),
        "gray": np.asarray((high - low).reshape(len(places), -1).max(axis=1, initial=0) <= 1),
        "digest": np.array(digests, dtype="V16"),
        "hash": perceptual_hash(luma),
        "thumb": np.rint(thumb).astype(np.uint8),
    }


def _on_canvas(pixels: Pixels) -> Pixels:
    """(S, S, 3) of an image of any size: averaged down, interpolated up."""
    if pixels.shape[:2] == (CANVAS, CANVAS):
        return pixels
    image = Image.fromarray(pixels)
    shrinks = min(image.size) >= CANVAS
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(image.resize((CANVAS, CANVAS), method))


def kind_of(data: bytes) -> tuple[str, str]:
    """(format, channels) of an encoded image, as it is stored: ('PNG', 'palette'), ('JPEG', 'CMYK'), ..."""
    if data[:3] == JPEG_MAGIC:
        space = simplejpeg.decode_jpeg_header(data, strict=False)[2]
        return "JPEG", {"Gray": "gray", "CMYK": "CMYK", "YCCK": "CMYK"}.get(space, "RGB")
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        depth = " 16 bit" if data[24] == 16 else ""
        return "PNG", PNG_COLORS.get(data[25], "other") + depth
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.format or "other", {"L": "gray", "P": "palette", "1": "1 bit"}.get(image.mode, image.mode)
