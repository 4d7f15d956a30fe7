"""A few real steps on this machine: what one process trains a second; and the drawing of a learning-rate curve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from distcnn.augment import Targets
from distcnn.build import Dataset, make_model
from distcnn.config import TrainConfig
from distcnn.distill import load_teacher
from distcnn.errors import UserError
from distcnn.optim import build_optimizer

SECONDS = 5.0


def images_per_second(config: TrainConfig, dataset: Dataset) -> float:
    """Forward, backward and optimizer on tiles of random pixels for about five seconds, on the GPU if there is one.

    Data loading is not in it: on a GPU that has enough cores beside it, it is hidden.
    """
    device = torch.device("cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu")
    model = make_model(config, dataset).to(device).train()
    optimizer = build_optimizer(config.optim, model)
    tile = config.optim.tile_size
    images = torch.randn((tile, 3, dataset.size, dataset.size), device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(tile, device=device) % len(dataset.classes)
    kind = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.run.mixed_precision]
    teacher, targets = (
        load_teacher(config, dataset, device),
        Targets(labels, labels, 1.0, torch.ones(tile, device=device)),
    )
    made, begun = -1, 0.0  # one to warm up
    while made < 1 or time.perf_counter() - begun < SECONDS:
        if made == 0:
            begun = _now(device)
        with torch.autocast(device.type, kind, enabled=kind is not torch.float32):
            if teacher:
                teacher.teach(images, targets)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if (made + 1) % config.geometry.lanes == 0:
            optimizer.step()
            optimizer.zero_grad()
        made += 1
    return made * tile / (_now(device) - begun)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_curve(points: Sequence[tuple[int, float]], path: Path) -> None:
    """The learning rate over the steps as a PNG. Raises UserError if it cannot be written."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _ in points], [rate for _, rate in points])
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"--curve {path} cannot be written: {error.strerror or error}") from error
