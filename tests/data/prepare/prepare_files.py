"""Images and folders made for the tests of prepare."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from distcnn.data.manifest import Manifest, load_manifest
from distcnn.data.prepare.build import Outcome, Settings, build
from distcnn.data.prepare.source import Source
from distcnn.data.shards import SplitReader


def picture(seed: int = 0, width: int = 12, height: int = 8, mode: str = "RGB") -> Image.Image:
    """A smooth image that is another for every seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def jpg(seed: int = 0, width: int = 12, height: int = 8) -> bytes:
    return encode(picture(seed, width, height), "JPEG", quality=90)


def png(seed: int = 0, width: int = 12, height: int = 8) -> bytes:
    return encode(picture(seed, width, height), "PNG")


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def class_folders(root: Path, counts: dict[str, int], seed: int = 0, width: int = 12, height: int = 8) -> Path:
    """<root>/<class>/<number>.jpg, all different."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write(root / name / f"{i:03d}.jpg", jpg(seed + 1000 * number + i, width, height))
    return root


def made(source: Source, output: Path, **settings: Any) -> Outcome:
    return build(source, output, Settings(**{"workers": 1, **settings}))


def contents(root: Path) -> dict[str, dict[str, tuple[int, bytes]]]:
    """split -> key -> (label, image), read by index."""
    manifest = load_manifest(root)
    out: dict[str, dict[str, tuple[int, bytes]]] = {}
    for name, split in manifest.splits.items():
        reader = SplitReader(root, split)
        ids = np.arange(len(reader))
        keys = [key for _, key in reader.keys(ids)]
        out[name] = dict(zip(keys, zip(reader.labels(ids).tolist(), reader.read(ids), strict=True), strict=True))
        reader.close()
    return out


def members(root: Path, manifest: Manifest) -> list[str]:
    """Names of all tar members."""
    names = []
    for split in manifest.splits.values():
        for shard in split.shards:
            with tarfile.open(root / shard.name) as tar:
                names += tar.getnames()
    return names


def by_webdataset(tars: list[Path]) -> list[dict[str, Any]]:
    """The samples as a plain webdataset.WebDataset gives them. It leaves closing its files to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
        gc.collect()
    return samples


def files_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def bytes_of(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in files_in(root)}


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def processes_of(session: int) -> list[str]:
    """The processes of a session that still run, as their command lines."""
    out = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ProcessLookupError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    out.append((entry / "cmdline").read_text())
    return out
