"""dataset.json: what a set of shards holds. Small, text, complete: counts, classes, checksums, statistics.

The manifest alone fixes N, the ids and the order of the samples; the index beside a shard says where their bytes are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distcnn.errors import DataError, nearest
from distcnn.files import write_atomically

MANIFEST_NAME = "dataset.json"
MANIFEST_VERSION = 1
UNLABELLED = -1


@dataclass(frozen=True)
class Shard:
    """One tar. `name` and `index` are paths relative to the folder of dataset.json, or absolute, or URLs."""

    name: str
    index: str
    samples: int
    bytes: int
    sha256: str = ""  # of the whole tar; "" where nobody has read it through

    def __post_init__(self) -> None:
        if self.samples < 0 or self.bytes < 0:
            raise ValueError(f"shard {self.name}: {self.samples} samples, {self.bytes} bytes")


@dataclass(frozen=True)
class Split:
    """The shards of one split in the order of their ids, and how many samples each class has (K,)."""

    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def labelled(self) -> bool:
        return bool(self.class_counts)


@dataclass(frozen=True)
class ImageStats:
    """Over the train split. Sizes in pixels; mean and std per RGB channel of values in [0, 1]. 0 and () = not known."""

    min_width: int = 0
    max_width: int = 0
    min_height: int = 0
    max_height: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    grayscale: bool = False

    @property
    def uniform(self) -> tuple[int, int] | None:
        """(height, width) where every image has the same size, else None."""
        if 0 < self.min_width == self.max_width and 0 < self.min_height == self.max_height:
            return self.min_height, self.min_width
        return None


@dataclass(frozen=True)
class Quarantined:
    """An image left out when the set was made or indexed: its name in the source and why."""

    name: str
    reason: str
    split: str = ""


@dataclass(frozen=True)
class Manifest:
    """A data set: class names by label, splits by name, statistics, and where it came from."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    image: ImageStats = field(default_factory=ImageStats)
    quarantined: tuple[Quarantined, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"data set {self.name!r} has two classes of the same name")
        for name, split in self.splits.items():
            classes, samples = len(split.class_counts), sum(split.class_counts)
            if split.labelled and (classes, samples) != (len(self.classes), split.samples):
                raise ValueError(
                    f"split {name!r} counts {samples} samples in {classes} classes,"
                    f" the data set has {split.samples} in {len(self.classes)}"
                )

    def split(self, name: str) -> Split:
        """The split called `name`. Raises DataError with the names there are."""
        if name not in self.splits:
            raise DataError(f"data set {self.name!r} has no split {name!r}{nearest(name, self.splits)}")
        return self.splits[name]

    def fingerprint(self) -> str:
        """sha256 (hex) of what fixes the samples: classes, their counts by split, the shards' sizes and checksums."""
        facts = {
            "version": self.version,
            "classes": self.classes,
            "splits": {
                name: [split.class_counts, *([s.samples, s.bytes, s.sha256] for s in split.shards)]
                for name, split in sorted(self.splits.items())
            },
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_manifest(manifest: Manifest, root: Path) -> Path:
    """Write `root`/dataset.json atomically: it comes last, so a folder that has it is a whole data set."""
    path = root / MANIFEST_NAME
    document = asdict(manifest) | {"fingerprint": manifest.fingerprint()}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))  # names that are no UTF-8: as JSON's \udcxx
    return path


def load_manifest(path: Path) -> Manifest:
    """Read dataset.json, given the file or its folder. Raises DataError naming the file and what is wrong with it."""
    file = path / MANIFEST_NAME if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no {MANIFEST_NAME} in {path}: make one with 'distcnn prepare' or 'distcnn index'")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        version = document["version"]
        if version != MANIFEST_VERSION:
            raise DataError(f"{file} has version {version}, this program reads {MANIFEST_VERSION}: prepare it again")
        manifest = _from_document(document)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}): prepare or index again") from error
    if document.get("fingerprint") != manifest.fingerprint():
        raise DataError(f"{file} was edited by hand (its fingerprint does not match): prepare or index again")
    return manifest


def _from_document(document: dict[str, Any]) -> Manifest:
    image = document["image"]
    return Manifest(
        name=str(document["name"]),
        classes=tuple(str(name) for name in document["classes"]),
        splits={
            name: Split(
                shards=tuple(Shard(**shard) for shard in split["shards"]),
                class_counts=tuple(int(count) for count in split["class_counts"]),
            )
            for name, split in document["splits"].items()
        },
        image=ImageStats(**(image | {"mean": tuple(image["mean"]), "std": tuple(image["std"])})),
        quarantined=tuple(Quarantined(**row) for row in document["quarantined"]),
        source=dict(document["source"]),
        version=int(document["version"]),
    )
