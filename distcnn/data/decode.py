"""Bytes to pixels: uint8 H W C, RGB, always.

simplejpeg decodes JPEG (libjpeg-turbo; measured here 10 times Pillow's speed at 32 px); Pillow takes the rest. What
comes out of each kind of image is fixed, so that a set gives the same pixels everywhere:

* grayscale, 1 bit, palette: converted to RGB; 16 bit: the high byte; CMYK: Pillow's conversion; floats: refused;
* alpha: laid over white; animated: the first frame; EXIF rotation: not applied here (`prepare` can apply it).
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485  # Pillow's own limit, beyond which it speaks of decompression bombs
MAX_BYTES = 256 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
JPEG_MAGIC = b"\xff\xd8\xff"


class DecodeError(ValueError):
    """These bytes are not an image that can be used; the text says why."""


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
