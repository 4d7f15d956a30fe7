"""How fast shards are indexed: 10,000 members, warm in the page cache, beside Python's tarfile.

    python benchmarks/index.py [--runs 7] [--samples 5000]

Two shards as webdataset's TarWriter writes them (a .cls and a .jpg a sample, each with a PAX header): small images of
2.5 kB, whose headers are read many at a time, and images of 100 kB, from header to header. One process;
its processor time, which says more than the clock where the machine is busy.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from distcnn.data.index import _Job, index_shard
from distcnn.data.labels import LabelRule
from distcnn.data.shards import samples_in


def write(path: Path, samples: int, image_bytes: int) -> None:
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(samples):
            writer.write({"__key__": f"{number:08d}", "jpg": rng.bytes(image_bytes), "cls": str(number % 10).encode()})


def with_tarfile(path: Path) -> int:
    with tarfile.open(path) as tar:
        return len(tar.getmembers())


def seconds(work: Callable[[], object], runs: int) -> list[float]:
    work()
    out = []
    for _ in range(runs):
        begun = time.process_time()
        work()
        out.append(time.process_time() - begun)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--samples", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for image_bytes in (2500, 100_000):
            path = Path(folder) / f"{image_bytes}.tar"
            write(path, options.samples, image_bytes)
            job = _Job("train", str(path), LabelRule(), (), False)
            ways: dict[str, Callable[[], object]] = {
                "headers": lambda path=path: sum(1 for _ in samples_in(path)),  # type: ignore[misc]
                "headers and labels": lambda job=job: index_shard(job),  # type: ignore[misc]
                "tarfile": lambda path=path: with_tarfile(path),  # type: ignore[misc]
            }
            for name, work in ways.items():
                taken = seconds(work, options.runs)
                print(
                    f"{image_bytes:>7} B images  {name:<20} median {statistics.median(taken):.3f} s,"
                    f" best {min(taken):.3f} s, {2 * options.samples} members, n={options.runs}"
                )
            path.unlink()


if __name__ == "__main__":
    main()
