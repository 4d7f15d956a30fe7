"""Thumbnails and contact sheets as data: URIs that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

TILE = 72  # pixels of a picture's side on a sheet
GAP = 4


def tile(image: Image.Image, pixels: int = TILE) -> Image.Image:
    """`pixels` x `pixels`: the middle square, small images enlarged without smoothing so that pixels stay pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    method = Image.Resampling.LANCZOS if side > pixels else Image.Resampling.NEAREST
    return image.resize((pixels, pixels), method, box=(left, top, left + side, top + side))


def sheet(tiles: Sequence[Image.Image], columns: int = 0) -> str:
    """A data: URI of thumbnails side by side, in rows of `columns` (0 = one row)."""
    across = max(1, min(columns or len(tiles), len(tiles)))
    down = max(1, -(-len(tiles) // across))
    whole = Image.new("RGBA", (across * (TILE + GAP) - GAP, down * (TILE + GAP) - GAP))  # gaps show the page
    for number, picture in enumerate(tiles):
        whole.paste(picture, ((number % across) * (TILE + GAP), number // across * (TILE + GAP)))
    return uri(whole)


def uri(image: Image.Image) -> str:
    """A data: URI of an image as WebP, which is small and may be transparent."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def png_uri(data: bytes) -> str:
    """A data: URI of PNG bytes."""
    return "data:image/png;base64," + base64.b64encode(data).decode()
