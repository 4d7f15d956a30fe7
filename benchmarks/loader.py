"""How many images a second the loader makes ready to train on, beside a ceiling and other loaders, in one run.

    python benchmarks/loader.py FOLDER [FOLDER ...] [--runs 3] [--seconds 3] [--threads 2] [--only NAME ...]

Ready to train on: float32, normalised, NCHW in channels_last, a batch at a time. The folders' names choose the
workload (see WORKLOADS); images are put into tar shards first, the peers read the files. Files lie in the page cache.

The ceiling is a bare pool of threads that only decodes the same bytes from memory with the same decoder; "one call" is
one that needs no Python for it. The contenders take turns: see contest.py.

    python benchmarks/loader.py FOLDER --python       # processor time beyond decoding and scaling, and a profile
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contender, contest, report

from distcnn.data.turbojpeg import libturbojpeg

SHARD_SAMPLES = 2000
SUFFIXES = (".jpg", ".jpeg")
SEED = 0


@dataclass(frozen=True)
class Workload:
    """What is trained on: side of the model's input in pixels, samples in a batch, and how images come to that size."""

    side: int
    batch: int
    crop: str  # random-resized | pad
    limit: int = 20_000  # images used at most


WORKLOADS = {
    "imagenet-samples": Workload(224, 64, "random-resized"),
    "flowers": Workload(128, 128, "random-resized"),
    "cifar10": Workload(32, 512, "pad"),
}


def image_files(folder: Path, limit: int) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    order = np.random.default_rng(0).permutation(len(found))[:limit]
    return [found[i] for i in order]


def write_shards(files: list[Path], root: Path) -> None:
    """Tar shards of the files as they are, and their index."""
    from distcnn.data.index import IndexRequest, index_data_set
    from distcnn.data.labels import parse_rule

    names = []
    for number, start in enumerate(range(0, len(files), SHARD_SAMPLES)):
        names.append(str(root / f"train-{number:06d}.tar"))
        with tarfile.open(names[-1], "w") as tar:
            for place, path in enumerate(files[start : start + SHARD_SAMPLES], start):
                for name, data in ((f"{place:07d}.jpg", path.read_bytes()), (f"{place:07d}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    request = IndexRequest(root=root, shards={"train": names}, rule=parse_rule("cls"), classes=("a", "b"), workers=1)
    index_data_set(request)


# Contenders: generators of the number of images made ready, endless.


def ceiling(files: list[Path], root: Path, work: Workload, threads: int) -> Iterator[int]:
    """Threads that decode from memory into fresh arrays, and do nothing else."""
    import simplejpeg

    data = [path.read_bytes() for path in files]
    pool = ThreadPoolExecutor(threads)

    def decode_all(part: list[bytes]) -> int:
        for encoded in part:
            simplejpeg.decode_jpeg(encoded, "RGB")
        return len(part)

    size = max(work.batch // threads, 1)
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    while True:
        yield from pool.map(decode_all, parts)


def ceiling_in_one_call(files: list[Path], root: Path, work: Workload, threads: int) -> Iterator[int]:
    """The same by libturbojpeg, without Python between images, which have the input's side."""
    from distcnn.data.shards import COLUMNS
    from distcnn.data.turbojpeg import make_decoder

    def prepared(part: list[Path]) -> tuple[Any, Any, Any]:
        decoder, columns = make_decoder(), np.zeros(len(part), dtype=COLUMNS)
        assert decoder is not None, "libturbojpeg is not installed"
        columns["size"] = [path.stat().st_size for path in part]
        opened = [os.open(path, os.O_RDONLY) for path in part]
        entries = decoder.read(columns, np.array(opened))
        entries["slot"] = np.arange(len(part))
        for file in opened:
            os.close(file)
        return decoder, entries, np.tile((0, 0, work.side, work.side), (len(part), 1))

    size = max(work.batch // threads, 1)
    parts = [prepared(files[start : start + size]) for start in range(0, len(files), size)]
    memory = threading.local()

    def decode_all(part: tuple[Any, Any, Any]) -> int:
        if not hasattr(memory, "slots"):
            memory.slots = np.zeros((size, work.side, work.side, 3), dtype=np.uint8)
        decoder, entries, boxes = part
        return int(decoder.fill(entries, boxes, memory.slots)[0].sum())

    pool = ThreadPoolExecutor(threads)
    while True:
        yield from pool.map(decode_all, parts)


def make_ours(
    root: Path, work: Workload, threads: int, prefetch: int, cache: bool, processes: int = 0
) -> tuple[Any, Any]:
    """(loader, augment) as a training run makes them."""
    import torch

    from distcnn.augment import IMAGENET_MEAN, IMAGENET_STD, Augment
    from distcnn.data.loader import Loader
    from distcnn.data.manifest import load_manifest
    from distcnn.data.shards import SplitReader
    from distcnn.data.views import View
    from distcnn.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    pads = work.crop == "pad"
    reader = SplitReader(root, load_manifest(root).split("train"))
    view = View(work.side, "none" if pads else "random-resized")
    shape = (work.side, work.side) if cache else None
    loader = Loader(reader, view, SEED, threads, prefetch, shape, not pads, processes=processes)
    return loader, Augment(IMAGENET_MEAN, IMAGENET_STD, SEED, padding=work.side // 8 if pads else 0, flip="random")


def ours(
    files: list[Path],
    root: Path,
    work: Workload,
    threads: int,
    prefetch: int = 3,
    cache: bool = False,
    processes: int = 0,
    finish: bool = True,
) -> Iterator[int]:
    import torch

    from distcnn.data.loader import training_requests
    from distcnn.data.order import EpochOrder, Geometry

    loader, augment = make_ours(root, work, threads, prefetch, cache, processes)
    device = torch.device("cpu")
    requests = (
        step
        for epoch in range(1_000_000)
        for step in training_requests(
            EpochOrder(loader.reader.counts, Geometry(work.batch, work.batch), SEED, epoch), range(1)
        )
    )
    with contextlib.closing(loader):
        for tiles in loader.steps(requests):
            ready = 0
            for tile in tiles:
                if not finish:
                    ready += len(tile.images)
                    continue
                x_NCHW, _ = augment(tile, device, train=True)
                assert x_NCHW.is_contiguous(memory_format=torch.channels_last) and x_NCHW.dtype == torch.float32
                ready += len(x_NCHW)
            yield ready


def for_a_gpu(files: list[Path], root: Path, work: Workload, threads: int) -> Iterator[int]:
    """uint8 tiles: a GPU crops (where that is by padding), mirrors and normalises by itself."""
    return ours(files, root, work, threads, finish=False)


def in_processes(files: list[Path], root: Path, work: Workload, threads: int) -> Iterator[int]:
    return ours(files, root, work, threads, processes=threads)


def cached(files: list[Path], root: Path, work: Workload, threads: int) -> Iterator[int]:
    return ours(files, root, work, threads, prefetch=1, cache=True)


def stream(files: list[Path], root: Path, work: Workload, threads: int) -> Iterator[int]:
    """--loader stream: webdataset's pipeline and worker processes behind the same interface."""
    import torch

    from distcnn.data.loader import training_requests
    from distcnn.data.order import EpochOrder, Geometry
    from distcnn.data.stream import Stream, StreamLoader

    plain, augment = make_ours(root, work, 1, 0, False)
    shards = tuple(str(path) for path in sorted(root.glob("*.tar")))
    loader = StreamLoader(Stream(shards, len(files), 2, SEED, 0), plain.view, threads)
    device = torch.device("cpu")
    geometry = Geometry(work.batch, work.batch)
    while True:
        for tiles in loader.steps(training_requests(EpochOrder(plain.reader.counts, geometry, SEED, 0), range(1))):
            for tile in tiles:
                yield len(augment(tile, device, train=True)[0])


def torchvision_v2(files: list[Path], root: Path, work: Workload, threads: int) -> Iterator[int]:
    """torchvision's decoder and its transforms v2 on uint8, in worker processes of PyTorch's DataLoader."""
    import torch
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    shape = (
        v2.RandomCrop(work.side, padding=work.side // 8)
        if work.crop == "pad"
        else v2.RandomResizedCrop(work.side, scale=(0.35, 1.0), antialias=True)
    )
    transform = v2.Compose(
        [
            shape,
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    class Files(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, place: int) -> Any:
            return transform(decode_image(read_file(str(files[place])), ImageReadMode.RGB)), 0

    loader = torch.utils.data.DataLoader(
        Files(),
        work.batch,
        shuffle=True,
        num_workers=threads,
        persistent_workers=True,
        drop_last=len(files) >= work.batch,
        prefetch_factor=4,
        multiprocessing_context="fork",
    )
    while True:
        for x_NCHW, _ in loader:
            yield len(x_NCHW.contiguous(memory_format=torch.channels_last))


CONTENDERS: dict[str, Contender] = {
    "ceiling": ceiling,
    "ceiling, one call": ceiling_in_one_call,
    "distcnn": ours,
    "distcnn, processes": in_processes,
    "distcnn, uint8": for_a_gpu,
    "distcnn, cache host": cached,
    "distcnn, stream": stream,
    "torchvision v2": torchvision_v2,
}


def compare(folder: Path, work: Workload, runs: int, seconds: float, threads: int, only: list[str]) -> None:
    files = image_files(folder, work.limit)
    names = [name for name in CONTENDERS if name in only or not only]
    if work.crop != "pad":
        names = [name for name in names if "cache" not in name]
    if work.side > 128 or not libturbojpeg():
        names = [name for name in names if "one call" not in name]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_shards(files, root)
        chosen = {name: CONTENDERS[name] for name in names}
        fills = {"distcnn, cache host": len(files)}
        results = contest(chosen, (files, root, work, threads), runs, seconds, fills)
    shape = f"{work.crop} {work.side} + flip, batch {work.batch}, {threads} threads or workers"
    report(f"{folder.name}: {len(files)} images, {shape}", results, "ceiling")


def bare_loop(files: list[Path], work: Workload) -> Callable[[], None]:
    """What decodes and scales the images, from memory and in one thread, and does nothing else."""
    import simplejpeg

    from distcnn.data.decode import memory
    from distcnn.data.resize import resize_into, upscale_kernel
    from distcnn.data.views import View

    data = [path.read_bytes() for path in files]
    place, upscale = memory(4000 * 4000 * 3), upscale_kernel()
    shapes = np.array([simplejpeg.decode_jpeg_header(encoded)[:2] for encoded in data])
    boxes = View(work.side, "random-resized").boxes(np.arange(len(data)), *shapes.T, SEED, 0).tolist()
    rows = [np.array([(0, 0, *shape, *box)]) for shape, box in zip(shapes.tolist(), boxes, strict=True)]
    slots = np.full((len(data), work.side, work.side, 3), 0, dtype=np.uint8)

    def loop() -> None:
        for encoded, box, slot, row in zip(data, boxes, slots, rows, strict=True):
            if work.crop == "pad":
                simplejpeg.decode_jpeg(encoded, "RGB", buffer=slot)
                continue
            pixels = simplejpeg.decode_jpeg(encoded, "RGB", buffer=place)
            if upscale and max(box[2:]) <= work.side:
                upscale(place, row, slot[None])
            else:
                resize_into(slot, pixels, box)

    return loop


def python_time(folder: Path, work: Workload) -> None:
    """Processor time of one thread: all of it, and that of the bare loop."""
    import cProfile
    import pstats

    files = image_files(folder, min(work.limit, 5000))
    bare = bare_loop(files, work)
    with tempfile.TemporaryDirectory() as scratch:
        write_shards(files, Path(scratch))
        batches = ours(files, Path(scratch), work, threads=1, prefetch=0)

        def whole() -> None:
            images = 0
            while images < len(files):
                images += next(batches)

        rounds = []
        whole()
        for _ in range(5):
            seconds = []
            for run in (whole, bare):
                before = time.process_time()
                run()
                seconds.append((time.process_time() - before) / len(files) * 1e6)
            rounds.append(seconds)
        all_of_it, decoding = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"\n{folder.name}: {all_of_it:.1f} us an image; decoding and scaling alone {decoding:.1f} us;")
        print(f"the rest (order, read, boxes, crop, flip, normalise, Python) {all_of_it - decoding:.1f} us")
        profile = cProfile.Profile()
        profile.enable()
        whole()
        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(14)
        print("\n".join(line for line in text.getvalue().splitlines()[6:] if line.strip()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--python", action="store_true")
    options = parser.parse_args()
    for folder in options.folders:
        if folder.name not in WORKLOADS:
            parser.error(f"{folder.name}: no workload of that name; there are {', '.join(WORKLOADS)}")
        if options.python:
            python_time(folder, WORKLOADS[folder.name])
        else:
            work = WORKLOADS[folder.name]
            compare(folder, work, options.runs, options.seconds, options.threads, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
