"""The data sets of torchvision.datasets, already downloaded or with leave to download them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from distcnn.data.prepare.arrays import source_of_arrays, to_pixels
from distcnn.data.prepare.source import FREE, SPLITS, Payload, Source, digest_of, number_labels
from distcnn.errors import DataError, UserError, nearest

SPLIT_VALUES = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
GUESSED_BYTES = 256 << 10  # of a decoded image whose size is not known before


def from_torchvision(name: str, root: Path, download: bool = False) -> Source:
    """The classification set torchvision.datasets.<name> below `root`, with the splits it has.

    Sets that keep files hand them over as they are; sets that keep arrays become PNG. Raises UserError for a name that
    torchvision does not have, and where the files are missing and `download` is False.
    """
    import torchvision

    names = [known for known in torchvision.datasets.__all__ if known[:1].isupper()]
    if name not in names:
        raise UserError(f"torchvision has no data set {name!r}{nearest(name, names)}")
    sets = _open_splits(getattr(torchvision.datasets, name), name, root, download)
    arrays = [getattr(opened, "data", None) for _, opened in sets]
    if all(array is not None and hasattr(array, "shape") for array in arrays):
        parts = [
            (split, to_pixels(np.asarray(array), f"{name} {split}"), np.asarray(_targets(opened)))
            for (split, opened), array in zip(sets, arrays, strict=True)
        ]
        return source_of_arrays("torchvision", name, parts, _classes(sets[0][1]), name)
    return _source_of_items(name, root, sets)


def _open_splits(kind: Any, name: str, root: Path, download: bool) -> list[tuple[str, Any]]:
    """(split or '', data set) for each split that the set has."""
    parameters = inspect.signature(kind.__init__).parameters
    common: dict[str, Any] = {"root": str(root)} if "root" in parameters else {}
    if "download" in parameters:
        common["download"] = download
    if "loader" in parameters:
        common["loader"] = str  # the path instead of decoded pixels: files stay what they are
    choices: list[tuple[str, dict[str, Any]]] = [("", {})]
    if "train" in parameters:
        choices = [("train", {"train": True}), ("test", {"train": False})]
    elif "split" in parameters:
        choices = [(split, {"split": value}) for split, values in SPLIT_VALUES.items() for value in values]
    opened = []
    for split, choice in choices:
        try:
            opened.append((split, kind(**common, **choice)))
        except ValueError:
            continue  # this set has no such split
        except (RuntimeError, OSError, TypeError, ImportError) as error:
            text = " ".join(str(error).split())
            hint = "" if download else "; --download fetches it, or --root says where it is"
            raise UserError(f"torchvision's {name} cannot be opened in {root}: {text}{hint}") from error
    if not opened:
        raise UserError(f"torchvision's {name} has no split called train, val or test")
    return opened


def _source_of_items(name: str, root: Path, sets: list[tuple[str, Any]]) -> Source:
    """A set that is read item by item: paths where it takes a loader, else pixels, decoded in this process."""
    items = [(opened, i) for _, opened in sets for i in range(len(opened))]
    if not items:
        raise DataError(f"torchvision's {name} in {root} holds no images")
    first = items[0][0][0]
    by_path = isinstance(first[0], str)
    labels = [label for _, opened in sets for label in _targets(opened)]
    if not all(isinstance(label, (int, np.integer)) for label in labels):
        raise UserError(f"torchvision's {name} is no classification set: its targets are not class numbers")
    ids, classes = number_labels([str(label) for label in labels], _classes(sets[0][1]), name)
    paths = [str(opened[i][0]) for opened, i in items] if by_path else []
    base = str(root.resolve())
    shown = [path.removeprefix(base).lstrip("/") for path in paths]
    split_of = [SPLITS.index(split) if split else FREE for split, opened in sets for _ in range(len(opened))]

    def payload(i: int) -> Payload:
        if by_path:
            return paths[i]
        opened, place = items[i]
        return np.array(opened[place][0].convert("RGB"), dtype=np.uint8)

    sizes = [Path(path).stat().st_size for path in paths] if by_path else [GUESSED_BYTES] * len(items)
    return Source(
        kind="torchvision",
        name=name,
        classes=classes,
        names=shown if by_path else [f"{i:08d}" for i in range(len(items))],
        named=by_path,
        labels=ids,
        payload=payload,
        sizes=np.array(sizes, dtype=np.int64),
        digest=digest_of([name, *paths], ids, np.array(sizes)),
        split_of=np.array(split_of, dtype=np.int64),
    )


def _targets(opened: Any) -> list[Any]:
    """The labels, without decoding images where the set keeps them apart."""
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(opened, attribute, None)
        if found is not None and len(found) == len(opened):
            return [int(label) if isinstance(label, np.integer) or hasattr(label, "item") else label for label in found]
    return [opened[i][1] for i in range(len(opened))]


def _classes(opened: Any) -> tuple[str, ...] | None:
    found = getattr(opened, "classes", None)
    if not found:
        return None
    return tuple(entry if isinstance(entry, str) else ", ".join(map(str, entry)) for entry in found)
