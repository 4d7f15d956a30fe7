"""Images that are arrays already: scikit-learn's digits, .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.prepare.source import FREE, SPLITS, Source, digest_of, number_labels, printable
from distcnn.errors import DataError

# Names of arrays in .npz files: Keras' x_train, MedMNIST's train_images, and plain ones without a split.
IMAGE_NAMES = ("x_{}", "{}_images", "images_{}", "X_{}", "{}_x")
LABEL_NAMES = ("y_{}", "{}_labels", "labels_{}", "y_{}", "{}_y")
PLAIN_IMAGES = ("images", "x", "X", "data")
PLAIN_LABELS = ("labels", "y", "label", "target", "targets")
CLASS_NAMES = ("classes", "class_names", "label_names")


def from_digits() -> Source:
    """scikit-learn's digits: 1797 images of 8x8, 10 classes; values 0..16 scaled to 0..255.

    E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return source_of_arrays("digits", "digits", [("", pixels, data.target)])


def from_npz(file: Path) -> Source:
    """Arrays of a .npz file: `images`, `labels`; or `x_train`, `y_train`, ... (Keras); `train_images`, ... (MedMNIST).

    Images (N, H, W), (N, H, W, 1), (N, H, W, 3) or (N, C, H, W), integers 0..255 or floats 0..1; labels (N,) integers
    or text. `classes` or `class_names` (K,) text may name integers 0..K-1. A test split without labels is left
    unlabelled. Raises DataError naming the array and what is wrong with it. Nothing is unpickled.
    """
    try:
        with file.open("rb") as opened:
            archive = np.load(opened, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files}  # a lone .npy has no files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"cannot read {file} as .npz without unpickling: {error}") from error
    parts = []
    for split in ("", *SPLITS):
        at = _first(arrays, PLAIN_IMAGES if not split else tuple(name.format(split) for name in IMAGE_NAMES))
        if at is None:
            continue
        label_at = _first(arrays, PLAIN_LABELS if not split else tuple(name.format(split) for name in LABEL_NAMES))
        if label_at is None and split != "test":
            raise DataError(f"{file}: array {at!r} has no labels beside it (arrays: {', '.join(arrays)})")
        labels = None if label_at is None else arrays[label_at]
        parts.append((split, to_pixels(arrays[at], f"{file}: array {at!r}"), labels))
    if not parts:
        raise DataError(
            f"{file} has no arrays 'images' and 'labels', or 'x_train' and 'y_train' (it has: {', '.join(arrays)})"
        )
    named = _first(arrays, CLASS_NAMES)
    classes = None if named is None else tuple(str(name) for name in arrays[named].tolist())
    return source_of_arrays("arrays", file.stem, parts, classes, str(file))


def source_of_arrays(
    kind: str,
    name: str,
    parts: list[tuple[str, NDArray[np.uint8], Any]],
    classes: tuple[str, ...] | None = None,
    where: str = "",
) -> Source:
    """A source of (split or '', pixels (n, H, W) or (n, H, W, 3) uint8, labels (n,) or None) parts.

    Without `classes`, they are the labels that occur. Raises DataError where labels and images do not fit.
    """
    texts: list[str] = []
    for split, pixels, labels in parts:
        flat = np.full(len(pixels), "") if labels is None else np.asarray(labels).reshape(-1)
        if len(flat) != len(pixels) or flat.dtype.kind not in "iuU":
            raise DataError(
                f"{where or name}: labels of {split or 'the images'} must be {len(pixels)} integers or texts,"
                f" not {flat.dtype} of shape {np.shape(labels)}"
            )
        texts += [printable(str(label)) for label in flat.tolist()]
    ids, classes = number_labels(texts, classes, where or name)
    n = len(texts)
    pixels_of = [image for _, pixels, _ in parts for image in pixels]
    split_of = np.concatenate([np.full(len(p), SPLITS.index(s) if s else FREE, dtype=np.int64) for s, p, _ in parts])
    return Source(
        kind=kind,
        name=name,
        classes=classes,
        names=[f"{i:08d}" for i in range(n)],
        labels=ids,
        payload=pixels_of.__getitem__,
        sizes=np.array([image.nbytes for image in pixels_of], dtype=np.int64),
        digest=digest_of(list(classes), ids, split_of, *(pixels for _, pixels, _ in parts)),
        split_of=split_of,
        named=False,
    )


def to_pixels(array: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """(N, H, W) or (N, H, W, 3) uint8 of images in another layout or type. Raises DataError naming `where`."""
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[:, :, :, 0]
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3) or 0 in array.shape:
        raise DataError(
            f"{where} has shape {array.shape}: images are (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        scaled: NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
        return scaled
    if array.dtype.kind in "iu" and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    raise DataError(f"{where} is {array.dtype} from {low:g} to {high:g}: give integers 0..255, or floats 0..1")


def _first(arrays: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in arrays), None)
