"""Files for the tests of this folder: images and tars, good and bad, made when they are needed."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file of pixels (H, W, 3), (H, W) or of a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """(H, W, 3) uint8 of smooth random colours: no two seeds look alike."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpg(seed: int = 0, height: int = 8, width: int = 8) -> bytes:
    return encode(picture(seed, height, width), "JPEG", quality=90)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of regular files in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(labels: Iterable[int | str], prefix: str = "", start: int = 0) -> list[tuple[str, bytes]]:
    """The members .cls and .jpg of a sample for each label."""
    out: list[tuple[str, bytes]] = []
    for number, label in enumerate(labels, start):
        out += [(f"{prefix}{number:04d}.cls", str(label).encode()), (f"{prefix}{number:04d}.jpg", jpg(number))]
    return out


class _Payload:
    """What a hostile pickle does: here it creates a file, to be seen."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def hostile_pickle(trace: Path) -> bytes:
    """A pickle that creates `trace` when it is loaded."""
    data = pickle.dumps(_Payload(trace))
    pickle.loads(data)
    assert trace.exists(), "the payload must work, or the tests that it is not run prove nothing"
    trace.unlink()
    return data
