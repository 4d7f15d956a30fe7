"""One image: read, checked by decoding it, and kept byte for byte unless there is a reason to encode it again.

Reasons: the source is pixels; the content is neither JPEG, PNG nor WebP (GIF, BMP, TIFF: first frame, as PNG); EXIF
says that the image does not stand upright and `exif` is "apply"; a side is longer than `max_side`; `format` asks for
another. What is encoded again becomes RGB by the rules of `distcnn.data.decode` (gray stays gray), without metadata.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from distcnn.data.decode import (
    FORMATS,
    HEADER_BYTES,
    JPEG_MAGIC,
    MAX_BYTES,
    MAX_PIXELS,
    DecodeError,
    Pixels,
    decode,
    memory,
    plain_header,
    to_rgb,
)
from distcnn.data.prepare.source import Payload, Slice
from distcnn.errors import UserError

MIN_SIDE = 2  # pixels; 1x1 is a place holder or a tracking pixel, and no CNN can learn from it
KEPT = ("jpg", "png", "webp")  # what shards hold
READ_FIRST = 1 << 16  # bytes; most small images come whole in one call
ORIENTATION = 0x0112
GRAY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Policy:
    """How images are kept. `max_side` in pixels, 0 = any; `quality` 1..100 of what is encoded again as JPEG or WebP."""

    format: Literal["keep", "jpg", "png", "webp"] = "keep"
    max_side: int = 0
    quality: int = 90
    exif: Literal["apply", "ignore"] = "apply"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: from 1 to 100")
        if self.max_side < 0 or 0 < self.max_side < MIN_SIDE:
            raise UserError(f"--max-side {self.max_side}: 0 (any size) or at least {MIN_SIDE} pixels")


@dataclass(frozen=True, slots=True)
class Checked:
    """An image that decodes: its bytes, what they are (jpg, png, webp), and its pixels (H, W, 3) uint8 RGB."""

    data: bytes
    extension: str
    pixels: Pixels


def load(payload: Payload, root: str) -> bytes | Pixels:
    """The bytes (or pixels) that a payload stands for. Raises DecodeError if they cannot be read."""
    try:
        if isinstance(payload, str):
            return _read(f"{root}/{payload}" if root else payload)
        if isinstance(payload, Slice):
            with Path(payload.path).open("rb") as file:
                file.seek(payload.offset)
                return file.read(payload.size)
        return payload
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror or error}") from error


def _read(path: str) -> bytes:
    """A file's bytes, at half the cost of open() for a small one. Raises DecodeError for a file over MAX_BYTES."""
    handle = os.open(path, os.O_RDONLY)
    try:
        data = os.read(handle, READ_FIRST)
        if len(data) < READ_FIRST:
            return data
        size = os.fstat(handle).st_size
        if size > MAX_BYTES:
            raise DecodeError(f"{size} bytes, more than {MAX_BYTES}")
        with open(handle, "rb", closefd=False) as file:
            return data + file.read()
    finally:
        os.close(handle)


def check(content: bytes | Pixels, policy: Policy) -> Checked:
    """Decode an image once, and encode it again if it must be. Raises DecodeError with why it cannot be used."""
    if isinstance(content, np.ndarray):
        return _encode(Image.fromarray(content), policy, "png")
    if not content:
        raise DecodeError("0 bytes")
    kind = sniff(content)
    if kind and policy.format in ("keep", kind) and (policy.exif == "ignore" or _orientation(content, kind) == 1):
        pixels = decode(content, policy.max_pixels)
        height, width = pixels.shape[:2]
        _check_sides(width, height)
        if not policy.max_side or max(width, height) <= policy.max_side:
            return Checked(content, kind, pixels)
    return _encode(_open(content, policy), policy, kind or "png")


class Checker:
    """`check` for one image after another: quick where a JPEG has the size of the one before, as in most sets.

    The pixels of an image may lie in memory that the next one uses again.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._slot: Pixels = np.empty((0, 0, 3), dtype=np.uint8)
        self._header = b""  # that a JPEG of the slot's size has; b"" before the first one

    def __call__(self, content: bytes | Pixels) -> Checked:
        """Raises DecodeError with why an image cannot be used."""
        if isinstance(content, bytes) and self._is_like_before(content):
            with contextlib.suppress(ValueError):  # damaged, which `check` describes
                if simplejpeg.decode_jpeg(content, "RGB", buffer=self._slot).shape == self._slot.shape:
                    return Checked(content, "jpg", self._slot)
        checked = check(content, self._policy)
        if checked.data is content and checked.extension == "jpg":  # the policy keeps images of this size as they are
            height, width = checked.pixels.shape[:2]
            slot = memory(height * width * 3).reshape(height, width, 3)
            self._slot, self._header = slot, plain_header(height, width)
        return checked

    def _is_like_before(self, data: bytes) -> bool:
        """A JPEG with the header of the slot's size, and without EXIF that might turn it."""
        return (
            self._header != b""
            and data.startswith(JPEG_MAGIC)
            and data.find(self._header, 0, HEADER_BYTES) >= 0
            and (self._policy.exif == "ignore" or data.find(b"Exif\0\0") < 0)
        )


def sniff(data: bytes) -> str:
    """What the first bytes say: jpg, png, webp or ''. Names of files are not believed."""
    if data[:3] == JPEG_MAGIC:
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return ""


def _orientation(data: bytes, kind: str) -> int:
    """EXIF's orientation, 1 = upright. Pillow (50 us) is asked only where there is EXIF at all (1 us)."""
    if not _jpeg_has_exif(data) if kind == "jpg" else (b"eXIf" if kind == "png" else b"EXIF") not in data:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if kind == "png" and image.width * image.height <= MAX_PIXELS:
                image.load()  # the chunk may follow the pixels
            return _upright(image.getexif())
    except Exception:  # damaged metadata of any kind; whether the pixels are good is seen when they are decoded
        return 1


def _jpeg_has_exif(data: bytes) -> bool:
    """Whether an APP1 segment of EXIF is among the APPn and comment segments that a JPEG begins with."""
    at = 2
    while data[at : at + 1] == b"\xff" and len(data) > at + 10:
        marker = data[at + 1]
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return True
        if not 0xE0 <= marker <= 0xEF and marker != 0xFE:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _upright(exif: Image.Exif) -> int:
    """Orientation 1..8 of EXIF data; what is not one of them counts as upright."""
    value = exif.get(ORIENTATION, 1)
    return value if value in UPRIGHT else 1


def _open(data: bytes, policy: Policy) -> Image.Image:
    """The first frame as L or RGB, 8 bits, upright if the policy says so, at full size or somewhat over max_side."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > policy.max_pixels:
                raise DecodeError(f"{image.width}x{image.height} pixels, more than {policy.max_pixels}")
            _check_sides(image.width, image.height)
            gray = image.mode in GRAY_MODES and "transparency" not in image.info
            pixels = _scaled_jpeg(data, policy.max_side) if image.format == "JPEG" else None
            opened = Image.fromarray(to_rgb(image) if pixels is None else pixels)
            orientation = _upright(image.getexif())
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"more than {policy.max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"not an image in {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:
        raise DecodeError(f"damaged: {error}") from error
    if gray:
        opened = opened.convert("L")  # of three equal channels, L is exactly one
    if policy.exif == "apply" and orientation != 1:
        opened = opened.transpose(UPRIGHT[orientation])
    return opened


def _scaled_jpeg(data: bytes, max_side: int) -> Pixels | None:
    """A JPEG decoded at 1/2, 1/4 or 1/8 where that still has twice max_side: the decoder does most of the work.

    None where that does not apply.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        scale = 2 * max_side / max(width, height)
        if not max_side or scale > 0.5 or space == "CMYK":
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=max(1, round(height * scale)), min_width=max(1, round(width * scale))
        )
        return pixels
    except ValueError:
        return None


def _encode(image: Image.Image, policy: Policy, kind: str) -> Checked:
    """`image` (L or RGB) scaled down to max_side and encoded as the policy's format, or `kind` where that is "keep"."""
    _check_sides(*image.size)
    if policy.max_side and max(image.size) > policy.max_side:
        scale = policy.max_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        _check_sides(*image.size)
    extension = kind if policy.format == "keep" else policy.format
    out = io.BytesIO()
    if extension == "png":
        image.save(out, "PNG")
        return Checked(out.getvalue(), extension, np.asarray(image.convert("RGB")))
    image.save(out, "JPEG" if extension == "jpg" else "WEBP", quality=policy.quality)
    return Checked(out.getvalue(), extension, decode(out.getvalue()))


def _check_sides(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise DecodeError(f"{width}x{height} pixels: a side under {MIN_SIDE} shows nothing")
