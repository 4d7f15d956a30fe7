"""How many images a second one GPU trains, what it spends its time on, and how far from the roof that is.

    benchmarks/gpu.sh [--cifar FOLDER] [...]              # the tests of a GPU first, then this file
    python benchmarks/gpu.py [--model resnet50] [--batch 256] [--cifar FOLDER] [--runs 3] [--seconds 10]
    python benchmarks/gpu.py --device cpu --tiny          # does this file run? Its numbers say nothing

bare: torchvision's network, autocast, channels_last, fused SGD on one batch in memory, cuDNN's fastest kernels.
distcnn, tree: `train_step` on tiles that lie on the GPU, one tile a step, with kernels that add in one order.
distcnn, ddp: the same with the fastest kernels. fed: the whole way from shards of JPEG files (drawn here, 500x375 px,
in the page cache), decoded by the CPU's threads or by nvJPEG. loader alone: nothing is computed.

Each contender is a process of its own, one after the other. FOLDER is CIFAR-10 as `distcnn prepare torchvision
CIFAR10` makes it: then configs/cifar10_fast.toml is trained, to be compared with 94.0 %.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import roof

KINDS = {  # what a kernel is, by its name; the first that matches
    "copies": r"memcpy|memset",
    "convolutions, products": r"conv|gemm|xmma|cutlass|fprop|dgrad|wgrad|mm\b|nhwcToNchw|nchwToNhwc",
    "batch norm": r"batch_?norm|bn_fw|bn_bw|welford",
    "pooling": r"pool",
    "sums over processes": r"nccl",
    "optimizer": r"adam|sgd|multi_tensor|foreach",
    "fused by the compiler": r"triton",
    "element by element": r"elementwise|vectorized|threshold|relu|add|mul|copy_|fill|lerp|cat",
}


@dataclass(frozen=True)
class Work:
    """What is trained, and where."""

    device: str
    model: str
    side: int
    batch: int
    precision: str
    data: Path
    scratch: Path
    threads: int

    def flags(self, **more: Any) -> dict[str, Any]:
        """A config of distcnn for it."""
        size = {"model": self.model, "image_size": self.side, "global_batch_size": self.batch, "tile_size": self.batch}
        where = {"data": str(self.data), "output": str(self.scratch / "run"), "device": self.device}
        how = {"optimizer": "sgd", "lr": 0.01, "flip": "random", "cache": "off", "mixed_precision": self.precision}
        quiet = {"wandb_mode": "disabled", "quiet": True, "epochs": 1_000_000, "decode_threads": self.threads}
        return {**size, **where, **how, **quiet, **more}


# Contenders: generators of the number of images that were just done, endless. Nobody waits for the device here.


def bare(work: Work, compiled: bool) -> Iterator[int]:
    import torch

    from distcnn.config import from_flat
    from distcnn.models import build_plain

    torch.backends.cudnn.benchmark = True
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[work.precision]
    model = build_plain(from_flat(work.flags()).model, 1000, work.side).to(work.device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, fused=True)
    x_NCHW = torch.randn(work.batch, 3, work.side, work.side, device=work.device)
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
    labels_N = torch.arange(work.batch, device=work.device) % 1000
    if compiled:
        model.compile()
    while True:
        with torch.autocast(work.device, kind, enabled=kind is not torch.float32):
            loss = torch.nn.functional.cross_entropy(model(x_NCHW), labels_N)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield work.batch


def make_job(work: Work, **more: Any) -> tuple[Any, Iterator[list[Any]]]:
    """A training run's job, and the tiles of its steps, for ever."""
    from distcnn.build import compute_threads, open_dataset
    from distcnn.config import from_flat
    from distcnn.console import Console
    from distcnn.data.loader import training_requests
    from distcnn.data.order import EpochOrder
    from distcnn.distributed import Runtime, process_cores
    from distcnn.job import build_job
    from distcnn.preempt import StopRequest
    from distcnn.world import World

    config = from_flat(work.flags(**more))
    dataset = open_dataset(config, World())
    runtime = Runtime(config.run, World(), compute_threads(config, dataset, World(), process_cores()))
    with StopRequest(config.output, False) as stop:
        job = build_job(config, dataset, runtime, Console(False), stop)

    def steps() -> Iterator[list[Any]]:
        for epoch in range(config.optim.epochs):
            order = EpochOrder(job.loader.reader.counts, config.geometry, config.run.seed, epoch)
            yield from job.loader.steps(training_requests(order, range(config.geometry.lanes)))

    return job, steps()


def ours(work: Work, fed: bool, **more: Any) -> Iterator[int]:
    from distcnn.train import train_step

    job, steps = make_job(work, **more)
    tiles = next(steps)
    while True:
        samples = sum(len(tile.labels) for tile in tiles)
        train_step(job, tiles, samples, 0.01)
        yield samples
        if fed:
            tiles = next(steps)


def loader_alone(work: Work, **more: Any) -> Iterator[int]:
    _, steps = make_job(work, **more)
    for tiles in steps:
        yield sum(len(tile.labels) for tile in tiles)


CONTENDERS: dict[str, Callable[[Work], Iterator[int]]] = {
    "bare, eager": lambda work: bare(work, compiled=False),
    "bare, compiled": lambda work: bare(work, compiled=True),
    "distcnn, tree, eager": lambda work: ours(work, fed=False),
    "distcnn, ddp, eager": lambda work: ours(work, fed=False, reduction="ddp"),
    "distcnn, ddp, compiled": lambda work: ours(work, fed=False, reduction="ddp", compile=True),
    "loader alone, CPU decode": lambda work: loader_alone(work),
    "loader alone, nvjpeg": lambda work: loader_alone(work, decode="nvjpeg"),
    "fed, CPU decode": lambda work: ours(work, fed=True, reduction="ddp", compile=True),
    "fed, nvjpeg": lambda work: ours(work, fed=True, reduction="ddp", compile=True, decode="nvjpeg"),
}
TINY = ("bare, eager", "distcnn, tree, eager", "loader alone, CPU decode")


def wait_for(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def serve(pipe: Connection, name: str, work: Work, runs: int, seconds: float) -> None:
    """Send the images a second of each run, and the most GiB that were in use; or what went wrong."""
    try:
        made = CONTENDERS[name](work)
        rates = []
        for run in range(runs + 1):  # the first one warms up: libraries, compilation, memory
            images, begun, least = 0, time.perf_counter(), 3 * work.batch
            while images < least or time.perf_counter() - begun < seconds:
                images += next(made)
            wait_for(work.device)
            if run:
                rates.append(images / (time.perf_counter() - begun))
        pipe.send((rates, memory_used(work.device), ""))
    except Exception as error:
        pipe.send(([], 0.0, f"{type(error).__name__}: {error}".splitlines()[0][:100]))


def memory_used(device: str) -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def in_a_process(target: Callable[..., None], *arguments: Any) -> Any:
    """What `target(pipe, *arguments)` sends, from a process of its own."""
    context = get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=target, args=(its, *arguments))
    process.start()
    its.close()
    try:
        return mine.recv()
    except EOFError:
        return None
    finally:
        process.join()


def find_peaks(pipe: Connection, device: str, tiny: bool) -> None:
    """Send (operations a second of a product of large matrices, bytes a second of a copy): the device's own roof."""
    import torch

    n, values = (256, 1 << 18) if tiny else (8192, 1 << 29)
    kind = torch.float32 if tiny else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    source = torch.zeros(values, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any], repeats: int = 10) -> float:
        found = []
        for _ in range(5):
            wait_for(device)
            begun = time.perf_counter()
            for _ in range(repeats):
                work()
            wait_for(device)
            found.append((time.perf_counter() - begun) / repeats)
        return min(found)

    pipe.send((2 * n**3 / best(lambda: a @ b), 2 * values / best(lambda: target.copy_(source))))


def split_time(pipe: Connection, work: Work, compiled: bool) -> None:
    """Send (seconds by kind of kernel, seconds in all) of a step of `distcnn, ddp`, by torch.profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    made, steps = ours(work, fed=False, reduction="ddp", compile=compiled), 5
    for _ in range(5):
        next(made)
    gpu = work.device == "cuda"
    wait_for(work.device)
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            next(made)
        wait_for(work.device)
    elapsed = time.perf_counter() - begun
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if gpu == (event.device_type == torch.autograd.DeviceType.CUDA):
            microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
            spent[kind_of(event.key)] += microseconds / 1e6 / steps
    pipe.send((dict(spent), elapsed / steps))


def kind_of(kernel: str) -> str:
    """What a kernel does, from its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def draw_images(folder: Path, number: int, width: int, height: int) -> Path:
    """A data set of JPEG files, like photographs in size and detail: the files of ImageNet have 110 kB in the mean.

    Four fifths are there to train on: of five batches whole ones, so that no step is of another shape.
    """
    import numpy as np
    from PIL import Image

    from distcnn.cli import main as distcnn

    noise = np.random.default_rng(0)
    for place in range(number):
        small = noise.integers(0, 256, (height // 25 + 2, width // 25 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = noise.normal(0, 9, (height, width, 1)).astype(np.int16)
        path = folder / "files" / str(place % 8) / f"{place}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    words = ["prepare", "folder", str(folder / "files"), "--output", str(folder / "set"), "--val-fraction", "0.2"]
    with contextlib.redirect_stdout(io.StringIO()):
        if distcnn(words):
            raise SystemExit("the images could not be prepared")
    return folder / "set"


def train_cifar(asked: argparse.Namespace, scratch: Path) -> None:
    """Train the fast recipe some times over; print top-1 and seconds."""
    root = Path(__file__).resolve().parent.parent
    recipe, more = root / "configs/cifar10_fast.toml", ["--mixed-precision", "bf16", "--compile"]
    if asked.tiny:
        recipe, more = root / "configs/digits.toml", ["--epochs", "1"]
    found = []
    for seed in range(asked.runs):
        output = scratch / f"cifar{seed}"
        words = [
            "--config",
            recipe,
            "--data",
            asked.cifar,
            "--seed",
            seed,
            "--output",
            output,
            "--device",
            asked.device,
        ]
        quiet = ["--wandb-mode", "disabled", "--quiet"]
        command = [sys.executable, "-m", "distcnn", "train", *map(str, words), *more, *quiet]
        begun = time.perf_counter()
        if subprocess.run(command, check=False).returncode:
            print(f"{recipe.name}: the run failed")
            return
        results = json.loads((output / "results.json").read_text())
        found.append((results["val/top1"], results["wall_seconds"], time.perf_counter() - begun))
    top1, inside, outside = (statistics.mean(column) for column in zip(*found, strict=True))
    print(
        f"\n{recipe.name}: {top1:.2%} top-1 (mean of {len(found)}, lowest {min(found)[0]:.2%}); {inside:.1f} s a run,"
        f" {outside:.1f} s with the start of the process"
    )


def print_table(rates: dict[str, tuple[list[float], float, str]], limit: float) -> None:
    print(f"\n{'images a second':<28}{'median':>10}{'lowest':>10}{'highest':>10}{'of the roof':>13}{'GiB':>7}")
    for name, (runs, gibibytes, trouble) in rates.items():
        if trouble:
            print(f"{name:<28}{trouble}")
            continue
        middle = statistics.median(runs)
        share = "" if name.startswith("loader") else f"{middle / limit:.1%}"
        print(f"{name:<28}{middle:>10,.0f}{min(runs):>10,.0f}{max(runs):>10,.0f}{share:>13}{gibibytes:>7.1f}")


def print_roof(work: Work, peaks: tuple[float, float]) -> float:
    """Print the network's roofs on this device; returns the lowest one."""
    import torch

    width = 4 if work.precision == "no" else 2
    x_NCHW = torch.empty(work.batch, 3, work.side, work.side, device="meta")
    kernels = roof.kernels_of(roof.build(work.model, work.side), x_NCHW, width)
    flops, moved = (
        sum(values) / work.batch for values in zip(*((k.operations, k.bytes) for k in kernels), strict=True)
    )
    print(f"measured here: {peaks[0] / 1e12:,.1f} TFLOP/s in a product, {peaks[1] / 1e9:,.0f} GB/s in a copy")
    rates = {level: roof.images_per_second(kernels, work.batch, *peaks, level) for level in roof.LEVELS}
    texts = ", ".join(f"{level} {rate:,.0f}" for level, rate in rates.items())
    print(f"{flops / 1e9:.1f} GFLOP and {moved / 1e6:.0f} MB an image: at most {texts} images/s (see roof.py)")
    return rates["eager"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16")
    parser.add_argument("--threads", type=int, default=0, help="that decode; 0: as many as there are cores")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as distcnn prepares it")
    parser.add_argument("--only", nargs="*", metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tiny", action="store_true", help="a small network for a moment, to see that it runs")
    asked = parser.parse_args()
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here: nothing is measured (--device cpu --tiny only tries this program)")
        return 2
    names = asked.only or (TINY if asked.tiny else tuple(CONTENDERS))
    if asked.tiny:
        asked.model, asked.side, asked.batch, asked.precision = "resnet18", 32, 8, "no"
        asked.runs, asked.seconds = 1, 0.2
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = draw_images(scratch, 5 * asked.batch, *((60, 45) if asked.tiny else (500, 375)))
        threads = asked.threads or len(os.sched_getaffinity(0))
        work = Work(asked.device, asked.model, asked.side, asked.batch, asked.precision, data, scratch, threads)
        hardware = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
        cuda = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if asked.device == "cuda" else ""
        print(f"\n{hardware}, {threads} decode threads, torch {torch.__version__}{cuda}")
        print(f"{work.model}, {work.side} px, batch {work.batch}, precision {work.precision}; medians of {asked.runs}")
        limit = print_roof(work, in_a_process(find_peaks, asked.device, asked.tiny))
        rates = {name: in_a_process(serve, name, work, asked.runs, asked.seconds) for name in names}
        print_table({name: found or ([], 0.0, "the process died") for name, found in rates.items()}, limit)
        for compiled in (False,) if asked.tiny else (False, True):
            print_split(in_a_process(split_time, work, compiled), "compiled" if compiled else "eager")
        if asked.cifar:
            train_cifar(asked, scratch)
    return 0


def print_split(found: tuple[dict[str, float], float] | None, how: str) -> None:
    if found is None:
        print(f"\nno profile of a step, {how}: the process died")
        return
    spent, elapsed = found
    print(f"\na step, {how}: {1e3 * elapsed:.1f} ms, of which the device computes {sum(spent.values()) / elapsed:.0%}")
    for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind:<26}{1e3 * seconds:>9.2f} ms  {seconds / sum(spent.values()):>6.1%}")


if __name__ == "__main__":
    sys.exit(main())
