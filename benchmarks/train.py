"""How many images a second training makes, end to end, beside the bare step of the same network on data in memory.

    python benchmarks/train.py FOLDER [--model resnet18] [--side 128] [--batch 64] [--runs 3] [--seconds 20]

FOLDER is what `distcnn prepare` has made. `bare step` is forward, loss, backward and SGD on one batch of normalised
images in memory, with freed memory kept (distcnn.memory); `bare step, torch's memory` is the same as torch comes.
`distcnn` are the steps of a training run with all that belongs to them: shards, decoding, augmentation, batch norm by
tile, ledger, meter. `DataLoader loop` is what tutorials write: torchvision's transforms v2 on files, in worker
processes, channels_last, SGD. The contenders take turns: see contest.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import Contender, contest, report

SMALLEST = 0.35  # of an image's area that a crop takes


@dataclass(frozen=True)
class Work:
    """What is trained, on how many threads."""

    data: Path
    model: str
    side: int
    batch: int
    threads: int
    scratch: Path

    @property
    def flags(self) -> dict[str, Any]:
        size = {"model": self.model, "image_size": self.side, "global_batch_size": self.batch, "tile_size": self.batch}
        quiet = {"device": "cpu", "wandb_mode": "disabled", "quiet": True, "output": str(self.scratch / "run")}
        how = {"optimizer": "sgd", "lr": 0.01, "flip": "random", "crop_scale": SMALLEST, "threads": self.threads}
        return {"data": str(self.data), **size, **quiet, **how, "epochs": 1_000_000, "cache": "off"}


def plain_parts(work: Work) -> tuple[Any, Any]:
    """(network, optimizer) as torch and torchvision have them."""
    import torch

    from distcnn.config import from_flat
    from distcnn.data.manifest import load_manifest
    from distcnn.models import build_plain

    torch.set_num_threads(work.threads)
    model = build_plain(from_flat(work.flags).model, len(load_manifest(work.data).classes), work.side)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, fused=True)


def plain_step(model: Any, optimizer: Any, x_NCHW: Any, labels_N: Any) -> int:
    import torch

    torch.nn.functional.cross_entropy(model(x_NCHW), labels_N).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return len(labels_N)


def bare_as_torch_comes(work: Work) -> Iterator[int]:
    import torch

    model, optimizer = plain_parts(work)
    x_NCHW = torch.randn(work.batch, 3, work.side, work.side).to(memory_format=torch.channels_last)
    labels_N = torch.arange(work.batch) % 2
    while True:
        yield plain_step(model, optimizer, x_NCHW, labels_N)


def bare(work: Work) -> Iterator[int]:
    from distcnn.memory import keep_freed_memory

    keep_freed_memory()
    yield from bare_as_torch_comes(work)


def ours(work: Work) -> Iterator[int]:
    from distcnn.build import open_dataset
    from distcnn.config import from_flat
    from distcnn.console import Console
    from distcnn.data.loader import training_requests
    from distcnn.data.order import EpochOrder
    from distcnn.distributed import Runtime
    from distcnn.job import build_job
    from distcnn.memory import keep_freed_memory
    from distcnn.preempt import StopRequest
    from distcnn.train import train_step
    from distcnn.world import World

    keep_freed_memory()
    config = from_flat(work.flags)
    dataset = open_dataset(config, World())
    with StopRequest(config.output, False) as stop:
        job = build_job(config, dataset, Runtime(config.run, World(), work.threads), Console(False), stop)
    for epoch in range(config.optim.epochs):
        order = EpochOrder(job.loader.reader.counts, config.geometry, config.run.seed, epoch)
        for tiles in job.loader.steps(training_requests(order, range(config.geometry.lanes), 0)):
            samples = sum(len(tile.labels) for tile in tiles)
            loss, _, _ = train_step(job, tiles, samples, 0.01)
            for tile in tiles:
                job.ledger.add(tile.request.ids)
            job.meter.add(loss, samples)
            yield samples
        job.meter.row(job.losses)


def data_loader(work: Work) -> Iterator[int]:
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    from distcnn.data.manifest import load_manifest
    from distcnn.data.shards import SplitReader

    reader = SplitReader(work.data, load_manifest(work.data).split("train"))
    encoded = reader.read(np.arange(len(reader)))
    labels = reader.labels(np.arange(len(reader)))
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(work.side, scale=(SMALLEST, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    class Images(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(encoded)

        def __getitem__(self, place: int) -> Any:
            data = torch.frombuffer(bytearray(encoded[place]), dtype=torch.uint8)
            return transform(decode_image(data, ImageReadMode.RGB)), int(labels[place])

    model, optimizer = plain_parts(work)
    loader = torch.utils.data.DataLoader(
        Images(), work.batch, shuffle=True, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    while True:
        for x_NCHW, labels_N in loader:
            yield plain_step(model, optimizer, x_NCHW.contiguous(memory_format=torch.channels_last), labels_N)


CONTENDERS: dict[str, Contender] = {
    "bare step": bare,
    "bare step, torch's memory": bare_as_torch_comes,
    "distcnn": ours,
    "DataLoader loop": data_loader,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(asked.data, asked.model, asked.side, asked.batch, asked.threads, Path(scratch))
        results = contest(CONTENDERS, (work,), asked.runs, asked.seconds)
    title = f"{asked.data.name}: {asked.model}, {asked.side} px, batch {asked.batch}, {asked.threads} threads"
    report(title, results, "bare step")


if __name__ == "__main__":
    main()
