"""Data sets for the tests of this folder: indexed, read back, inspected."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from shard_files import encode, jpg, picture, write_tar

from distcnn.data.index import IndexRequest, index_data_set
from distcnn.data.inspect.advice import Advice, advise
from distcnn.data.inspect.facts import Facts, inspect_data_set
from distcnn.data.inspect.page import page
from distcnn.data.inspect.pictures import Album
from distcnn.data.inspect.plots import plots
from distcnn.data.inspect.tables import print_tables
from distcnn.data.labels import parse_rule
from distcnn.data.manifest import Manifest, load_manifest
from distcnn.data.shards import SplitReader

Members = list[tuple[str, bytes]]


def make_set(root: Path, splits: dict[str, Members | list[Members]], label: str = "folder", **options: Any) -> Path:
    """A data set whose labels are folder names: one shard a split, or several."""
    shards: dict[str, list[str]] = {}
    for split, members in splits.items():
        parts = members if members and isinstance(members[0], list) else [members]
        shards[split] = [
            str(write_tar(root / f"{split}-{number}.tar", part, tarfile.PAX_FORMAT))  # type: ignore[arg-type]
            for number, part in enumerate(parts)
        ]
    index_data_set(IndexRequest(root, shards, rule=parse_rule(label), workers=1, **options))
    return root


def look(root: Path) -> Facts:
    return inspect_data_set(root, load_manifest(root), workers=1)


def texts(facts: Facts, level: str = "") -> str:
    return "\n".join(item.text for item in advise(facts) if not level or item.level == level)


def rendered(root: Path, facts: Facts) -> str:
    return page(facts, advise(facts), plots(facts), Album(root, load_manifest(root), facts))


def printed(facts: Facts, advice: list[Advice] | None = None) -> str:
    out = io.StringIO()
    print_tables(facts, advise(facts) if advice is None else advice, Console(file=out, width=200, color_system=None))
    return out.getvalue()


def index(root: Path, *paths: Path | str, split: str = "train", **options: Any) -> Manifest:
    request = IndexRequest(root, {split: [str(path) for path in paths]}, workers=1, **options)
    manifest = index_data_set(request)
    assert load_manifest(root) == manifest
    return manifest


def contents(root: Path, manifest: Manifest, split: str = "train") -> list[tuple[str, int, bytes]]:
    """(key, label, image) of every sample, read the way that training reads."""
    reader = SplitReader(root, manifest.split(split))
    ids = np.arange(len(reader))
    keys = [key for _, key in reader.keys(ids)]
    return list(zip(keys, reader.labels(ids).tolist(), reader.read(ids), strict=True))


def write_idx(path: Path, version: str = "v1.2") -> Path:
    """What DALI's wds2idx writes for a tar."""
    lines: list[list[str]] = []
    with tarfile.open(path) as tar:
        last = ""
        for info in tar.getmembers():
            key, _, extension = info.name.partition(".")
            if key != last:
                lines.append([])
            last = key
            lines[-1] += [extension, str(info.offset_data), str(info.size), info.name]
    out = path.with_name(path.name.split(".")[0] + ".idx")
    out.write_text("\n".join([f"{version} {len(lines)}", *(" ".join(line) for line in lines)]) + "\n")
    return out


def many(label: str, count: int, start: int = 0, side: int = 8) -> Members:
    return [(f"{label}/{n}.png", encode(picture(start + n, side, side))) for n in range(count)]


def noisy_picture(seed: int, side: int = 64) -> np.ndarray:
    """Random blobs with details, as photographs have them."""
    rng = np.random.default_rng(seed)
    out = np.zeros((side, side, 3))
    for cells in (4, 8, 16):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        out += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) / 3
    return out.astype(np.uint8)


def as_json(value: Any) -> list[tuple[str, bytes]]:
    return [("d/a.jpg", jpg(1)), ("d/a.json", json.dumps(value).encode())]


def example_set(root: Path) -> tuple[Path, Facts]:
    """Two splits with copies, look-alikes, a wrong label, several formats and sizes."""
    images = [noisy_picture(seed, 40 + 8 * (seed % 3)) for seed in range(24)]
    train = [(f"cat/{n:02d}.png", encode(image)) for n, image in enumerate(images[:12])]
    train += [(f"dog/{n:02d}.jpg", encode(image, "JPEG", quality=95)) for n, image in enumerate(images[12:16], 12)]
    train += [("dog/copy.png", encode(images[0])), ("dog/gray.png", encode(np.full((40, 40), 255, np.uint8)))]
    val = [(f"dog/{n:02d}.webp", encode(image, "WEBP", quality=95)) for n, image in enumerate(images[16:20], 16)]
    val += [("cat/leak.png", encode(images[1])), ("cat/near.jpg", encode(images[2], "JPEG", quality=80))]
    val += [("cat/black.png", encode(np.zeros((9, 90, 3), np.uint8)))]
    make_set(root, {"train": train, "val": val})
    return root, look(root)
