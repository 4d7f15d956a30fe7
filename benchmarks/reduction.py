"""The tree reduction beside DDP's all-reduce: the bare sum of 11 million floats, and whole training steps.

    python benchmarks/reduction.py [--processes 2,4,8] [--repeats 15] [--steps 15]

Starts itself with torchrun (gloo, CPU). Both ways are measured in the same processes, taking turns in changing order;
a measurement is the wall time of the slowest process, between barriers. A step is a ResNet-18's at --side px, one tile
of --tile images for each process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distcnn.build import open_dataset
from distcnn.config import from_flat
from distcnn.console import Console
from distcnn.data.loader import Tile, TileRequest
from distcnn.data.prepare import prepare_digits
from distcnn.distributed import Runtime
from distcnn.job import Job, build_job
from distcnn.preempt import StopRequest
from distcnn.train import train_step
from distcnn.world import World, read_world

FLOATS = 11_173_962  # of a ResNet-18 with 10 classes and a 3x3 stem
REDUCTIONS = ("tree", "ddp")


def slowest(work: Callable[[], object]) -> float:
    """Wall milliseconds of the slowest process."""
    dist.barrier()
    started = time.perf_counter()
    work()
    spent = torch.tensor([time.perf_counter() - started])
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return 1000 * float(spent)


def take_turns(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 2):
        for name in sorted(works, reverse=number % 2 == 0):
            spent = slowest(works[name])
            if number >= 2:  # the first ones set up connections and buffers
                found[name].append(spent)
    return found


def make_job(reduction: str, asked: argparse.Namespace, data: Path, world: World) -> Job:
    config = from_flat(
        {
            "data": str(data),
            "model": "resnet18",
            "image_size": asked.side,
            "global_batch_size": asked.tile * world.size,
            "tile_size": asked.tile,
            "reduction": reduction,
            "threads": 1,
            "device": "cpu",
            "wandb_mode": "disabled",
            "output": str(data / "run"),
        }
    )
    runtime = Runtime(config.run, world, 1)
    with StopRequest(config.output, False) as stop:
        return build_job(config, open_dataset(config, world), runtime, Console(False), stop)


def worker(asked: argparse.Namespace, data: Path) -> None:
    from distcnn import distributed

    world = read_world()
    begin = distributed._begin_group
    distributed._begin_group = lambda *given: None if dist.is_initialized() else begin(*given)
    jobs = {reduction: make_job(reduction, asked, data, world) for reduction in REDUCTIONS}
    noise = torch.Generator().manual_seed(world.rank)
    flat = torch.randn(FLOATS, generator=noise)
    bare: dict[str, Callable[[], object]] = {
        "tree": lambda: jobs["tree"].runtime._tree_all_reduce(flat),
        "ddp": lambda: dist.all_reduce(flat),
    }
    images = torch.randint(0, 256, (asked.tile, asked.side, asked.side, 3), dtype=torch.uint8, generator=noise)
    request = TileRequest(0, 0, world.rank, np.arange(asked.tile))
    tile = Tile(request, images, torch.arange(asked.tile) % 10, torch.ones(asked.tile))
    samples = asked.tile * world.size

    def step(job: Job) -> Callable[[], object]:
        return lambda: train_step(job, [tile], samples, 1e-3)

    found = {
        f"{FLOATS / 1e6:.1f} M floats": take_turns(bare, asked.repeats),
        f"step, {asked.side} px": take_turns({name: step(job) for name, job in jobs.items()}, asked.steps),
    }
    if world.is_main:
        (data / f"{world.size}.json").write_text(json.dumps(found))
    jobs["tree"].runtime.close()


def report(size: int, found: dict[str, dict[str, list[float]]]) -> None:
    for what, times in found.items():
        texts = []
        for name, values in times.items():
            low, high = (np.quantile(values, q) for q in (0.25, 0.75))
            texts.append(f"{name} {statistics.median(values):.0f} ms ({low:.0f} to {high:.0f})")
        ratios = [a / b for a, b in zip(times["tree"], times["ddp"], strict=True)]
        low, high = (np.quantile(ratios, q) for q in (0.25, 0.75))
        texts.append(f"tree / ddp {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}), n = {len(ratios)}")
        print(f"{size} processes, {what}: {'; '.join(texts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="2,4,8")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--tile", type=int, default=8)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.data:
        worker(asked, asked.data)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare_digits(data / "digits")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, gloo")
        for size in map(int, asked.processes.split(",")):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            subprocess.run([*torchrun, __file__, *sys.argv[1:], "--data", str(data / "digits")], check=True)
            report(size, json.loads((data / "digits" / f"{size}.json").read_text()))


if __name__ == "__main__":
    main()
