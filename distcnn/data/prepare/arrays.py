"""Images that are arrays already: scikit-learn's digits, .npz files, IDX files (MNIST)."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from distcnn.data.prepare.source import Labels, Source


def from_digits() -> Source:
    """scikit-learn's digits: 1797 images of 8x8, 10 classes; values 0..16 scaled to 0..255.

    E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return source_of_arrays("digits", "digits", pixels, data.target.astype(np.int64), tuple("0123456789"))


def source_of_arrays(
    kind: str, name: str, pixels: NDArray[np.uint8], labels: Labels, classes: tuple[str, ...]
) -> Source:
    """A source of `pixels` (N, H, W) or (N, H, W, 3) uint8 and `labels` (N,)."""
    n = len(pixels)
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data) if n else hashlib.sha256()
    digest.update(np.ascontiguousarray(labels).data)
    return Source(
        kind=kind,
        name=name,
        classes=classes,
        names=[f"{i:08d}" for i in range(n)],
        labels=labels,
        payload=lambda i: pixels[i],
        sizes=np.full(n, pixels[0].nbytes if n else 0, dtype=np.int64),
        digest=digest.hexdigest(),
        named=False,
    )
