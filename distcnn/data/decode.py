"""Bytes to pixels: uint8 H W C, RGB, always.

simplejpeg decodes JPEG (libjpeg-turbo; measured here 10 times Pillow's speed at 32 px); Pillow takes the rest. What
comes out of each kind of image is fixed, so that a set gives the same pixels everywhere:

* grayscale, 1 bit, palette: converted to RGB; 16 bit: the high byte; CMYK: Pillow's conversion; floats: refused;
* alpha: laid over white; animated: the first frame; EXIF rotation: not applied here (`prepare` can apply it).
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485  # Pillow's own limit, beyond which it speaks of decompression bombs
MAX_BYTES = 256 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
HEADER_BYTES = 4096  # of a file, in which a frame header is looked for
JPEG_MAGIC = b"\xff\xd8\xff"


class DecodeError(ValueError):
    """These bytes are not an image that can be used; the text says why."""


ALIGNED, OFF = 32, 16  # see `offset`


def offset(address: int) -> int:
    """How many bytes after `address` images should begin that are decoded straight into memory.

    Rows that begin at multiples of ALIGNED libjpeg-turbo writes past the processor's caches. Measured here, decoding
    takes 14 to 20 % longer then, and what reads the pixels next waits for them (benchmarks/LOG.md).
    """
    return (OFF - address) % ALIGNED


def memory(values: int) -> Pixels:
    """(values,) uint8, not cleared, for images to be decoded into: see `offset`."""
    whole = np.empty(values + ALIGNED - 1, dtype=np.uint8)
    start = offset(whole.ctypes.data)
    return whole[start : start + values]


@lru_cache(maxsize=1024)
def plain_header(height: int, width: int) -> bytes:
    """What the frame header of a baseline JPEG file of this size in YCbCr holds: marker, length, 8 bit, size, 3."""
    return b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + b"\x03"


def decode_into(data: bytes, slot: Pixels, header: bytes) -> Pixels:
    """(H, W, 3) uint8 RGB, decoded straight into `slot`, and then `slot` itself, where it has that shape.

    header: `plain_header` of the slot's shape. An image of another shape is returned as an array of its own; what is
    in `slot` then is not defined. The pixels are those of `decode`. Raises DecodeError.
    """
    try:
        # Looking for the bytes of a header takes an eighth of the time that parsing it takes.
        if data.find(header, 0, HEADER_BYTES) < 0:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if (height, width) != slot.shape[:2] or space == "CMYK":
                return decode(data)
        if simplejpeg.decode_jpeg(data, "RGB", buffer=slot).shape == slot.shape:
            return slot
    except ValueError:
        pass  # not a JPEG file, or one whose damage `decode` describes
    return decode(data)


def jpeg_shape(data: bytes, said: tuple[int, int] = (0, 0)) -> tuple[int, int] | None:
    """(height, width) in pixels from the header of a JPEG file that `decode_reduced` takes; None for all else.

    said: what the index says, which saves time where the header says the same.
    """
    possible = min(said) > 0 and max(said) < 1 << 16 and said[0] * said[1] <= MAX_PIXELS
    if possible and data.startswith(JPEG_MAGIC) and data.find(plain_header(*said), 0, HEADER_BYTES) >= 0:
        return said
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if space != "CMYK" and height * width <= MAX_PIXELS else None


def decode_reduced(data: bytes, shape: tuple[int, int], factor: int, place: Pixels) -> Pixels:
    """(ceil(H / factor), ceil(W / factor), 3) uint8 RGB of a JPEG file of `jpeg_shape` (H, W), laid into `place`.

    place: (values,) of it. factor: 1, 2, 4 or 8: it is scaled in the cosine domain while it is decoded, which
    costs a half to a quarter. With 1 the pixels are those of `decode`. Raises DecodeError.
    """
    height, width = -(-shape[0] // factor), -(-shape[1] // factor)
    out = place.reshape(height, width, 3)
    try:
        if factor == 1:
            made = simplejpeg.decode_jpeg(data, "RGB", buffer=place)
        else:
            made = simplejpeg.decode_jpeg(
                data, "RGB", min_height=height, min_width=width, min_factor=float(factor), buffer=place
            )
        if made.shape == out.shape:
            return out
    except ValueError:
        pass
    # Pillow takes some that libjpeg-turbo refuses, and says what is wrong with the others
    pixels = decode(data)[::factor, ::factor]
    if pixels.shape != out.shape:
        raise DecodeError(f"its header says {shape[1]}x{shape[0]} pixels, but there are others")
    out[:] = pixels
    return out


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(H, W, 3) uint8 RGB of an encoded image. Raises DecodeError."""
    if len(data) > MAX_BYTES:
        raise DecodeError(f"{len(data)} bytes, more than {MAX_BYTES}")
    if data[:3] == JPEG_MAGIC:
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    return _decode_pillow(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels | None:
    """The fast way, or None where Pillow has to do it (CMYK, unusual) or say what is wrong."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels:
            raise DecodeError(f"{width}x{height} pixels, more than {max_pixels}")
        if space == "CMYK":
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
        return pixels
    except DecodeError:
        raise
    except ValueError:
        return None


def _decode_pillow(data: bytes, max_pixels: int) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DecodeError(f"{image.width}x{image.height} pixels, more than {max_pixels}")
            return to_rgb(image)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"not an image in {', '.join(FORMATS)}" if data else "0 bytes") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"more pixels than {max_pixels}") from error
    except Exception as error:  # damaged bytes bring out any of them: fuzzing met a TypeError too
        raise DecodeError(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Pixels:
    """(H, W, 3) uint8 of an opened Pillow image by the rules at the top of this file. Raises DecodeError for floats."""
    if image.mode == "F":
        raise DecodeError("floating-point pixels, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        high = np.asarray(image) >> 8
        gray = high.astype(np.uint8) if high.dtype.kind == "u" else np.clip(high, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)
