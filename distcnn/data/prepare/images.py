"""One image: read, checked by decoding it, and kept byte for byte unless there is a reason to encode it again.

Reasons: the source is pixels; the content is neither JPEG, PNG nor WebP (GIF, BMP, TIFF: first frame, PNG); EXIF says
that the image lies on its side and `exif` is "apply"; a side is longer than `max_side`; `format` asks for another.
Whatever is encoded again becomes RGB by the rules of `distcnn.data.decode` (gray stays gray) and loses its metadata.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from distcnn.data.decode import FORMATS, MAX_BYTES, MAX_PIXELS, DecodeError, Pixels, decode, to_rgb
from distcnn.data.prepare.source import Payload, Slice

MIN_SIDE = 2  # pixels; a 1x1 image is a place holder or a tracking pixel, and no CNN can use it
MAX_RATIO = 8  # how much a JPEG may be scaled down while it is decoded
ORIENTATION = 0x0112

Format = Literal["keep", "jpg", "png", "webp"]


@dataclass(frozen=True)
class Policy:
    """How images are kept. `max_side` in pixels, 0 = any; `quality` 1..100 of what is encoded again as JPEG or WebP."""

    format: Format = "keep"
    max_side: int = 0
    quality: int = 95
    exif: Literal["apply", "ignore"] = "apply"
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Checked:
    """An image that decodes: its bytes, what they are (jpg, png, webp), and its pixels (H, W, 3)."""

    data: bytes
    extension: str
    pixels: Pixels


def load(payload: Payload) -> bytes | Pixels:
    """The bytes (or pixels) that a payload stands for. Raises DecodeError if they cannot be read."""
    if isinstance(payload, (bytes, np.ndarray)):
        return payload
    try:
        if isinstance(payload, Slice):
            with Path(payload.path).open("rb") as file:
                file.seek(payload.offset)
                return file.read(payload.size)
        return _read(payload)
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror or error}") from error


def _read(path: str) -> bytes:
    handle = os.open(path, os.O_RDONLY)  # a third of the time that open() takes for a small file
    try:
        size = os.fstat(handle).st_size
        if size > MAX_BYTES:
            raise DecodeError(f"{size} bytes, more than {MAX_BYTES}")
        pieces = [os.read(handle, size + 1)]
        while len(pieces[-1]) and sum(map(len, pieces)) < size:
            pieces.append(os.read(handle, size))
        return b"".join(pieces)
    finally:
        os.close(handle)


def check(content: bytes | Pixels, policy: Policy) -> Checked:
    """Decode an image once, and encode it again if it must be. Raises DecodeError with why it cannot be used."""
    if isinstance(content, np.ndarray):
        return _encode(Image.fromarray(content), policy, "png")
    if not content:
        raise DecodeError("0 bytes")
    kind = sniff(content)
    if kind in ("jpg", "png", "webp") and not _must_encode(content, kind, policy):
        pixels = decode(content, policy.max_pixels)
        _check_sides(pixels.shape[1], pixels.shape[0])
        if not policy.max_side or max(pixels.shape[:2]) <= policy.max_side:
            return Checked(content, kind, pixels)
    return _encode(_open(content, policy), policy, kind if kind in ("jpg", "png", "webp") else "png")


def sniff(data: bytes) -> str:
    """What the first bytes say: jpg, png, webp or ''. Names of files are not believed."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return ""


def _must_encode(data: bytes, kind: str, policy: Policy) -> bool:
    """Whether something other than the size asks for a new encoding; the size is seen when decoding."""
    if policy.format not in ("keep", kind):
        return True
    return policy.exif == "apply" and _orientation(data, kind) > 1


def _orientation(data: bytes, kind: str) -> int:
    """EXIF's orientation, 1 = upright. Pillow (50 us) is asked only where the bytes speak of EXIF at all (0.1 us)."""
    mark = {"jpg": b"Exif\0\0", "png": b"eXIf", "webp": b"EXIF"}[kind]
    if mark not in (data[: 1 << 17] if kind == "jpg" else data):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if kind == "png":
                image.load()  # the chunk may follow the pixels
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata of any kind; the pixels decide whether the image is good
        return 1


def _open(data: bytes, policy: Policy) -> Image.Image:
    """The first frame, 8 bits, L or RGB, upright if the policy says so, at its full size or a little over max_side."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > policy.max_pixels:
                raise DecodeError(f"{image.width}x{image.height} pixels, more than {policy.max_pixels}")
            _check_sides(image.width, image.height)
            exif = image.getexif()
            gray = image.mode in ("1", "L", "I;16", "I;16B", "I;16L", "I") and "transparency" not in image.info
            pixels = _scaled_jpeg(data, policy) if image.format == "JPEG" and policy.max_side else None
            opened = Image.fromarray(to_rgb(image) if pixels is None else pixels)
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"more than {policy.max_pixels} pixels") from error
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:
        raise DecodeError(f"damaged, or not an image in {', '.join(FORMATS)}: {error}") from error
    if gray:
        opened = opened.convert("L")  # three equal channels: L is exactly one of them
    if policy.exif == "apply" and exif.get(ORIENTATION, 1) in range(2, 9):
        opened.info["exif"] = exif.tobytes()
        upright = ImageOps.exif_transpose(opened)
        upright.info.clear()
        return upright
    return opened


def _scaled_jpeg(data: bytes, policy: Policy) -> Pixels | None:
    """A JPEG decoded at 1/2, 1/4 or 1/8 where that is still at least max_side: the decoder does most of the work."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space == "CMYK":
            return None
        scale = policy.max_side / max(width, height)
        if scale >= 0.5:
            return None
        low, wide = max(1, int(height * scale)), max(1, int(width * scale))
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=2 * low, min_width=2 * wide)
        return pixels
    except ValueError:
        return None


def _encode(image: Image.Image, policy: Policy, kind: str) -> Checked:
    """`image` (L or RGB) scaled down to max_side and encoded as the policy's format, or `kind` where it is "keep"."""
    _check_sides(*image.size)
    if policy.max_side and max(image.size) > policy.max_side:
        scale = policy.max_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        _check_sides(*image.size)
    extension = kind if policy.format == "keep" else policy.format
    out = io.BytesIO()
    if extension == "jpg":
        image.save(out, "JPEG", quality=policy.quality)
    elif extension == "webp":
        image.save(out, "WEBP", quality=policy.quality)
    else:
        image.save(out, "PNG")
    data = out.getvalue()
    pixels = np.asarray(image.convert("RGB")) if extension == "png" else decode(data, policy.max_pixels)
    return Checked(data, extension, pixels)


def _check_sides(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise DecodeError(f"{width}x{height} pixels: a side under {MIN_SIDE} shows nothing")
