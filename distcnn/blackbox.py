"""The black box: what is needed to compute a step again whose loss or gradient was not finite.

blackbox/step_00000123/ holds box.json (position, versions, checkpoint), config.toml, model.safetensors (the weights and
buffers before the step) and from each rank rank_<r>.json: its samples by name, the losses of its tiles as they were in
training, and what a second computation of each tile, alone, gives layer by layer. `distcnn replay DIR` does that
anywhere, on one CPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn

from distcnn.augment import Augment
from distcnn.build import Dataset, make_augment, make_balance, make_loader, make_loss, make_model, make_order
from distcnn.checkpoint import FOLDER as CHECKPOINTS
from distcnn.config import TrainConfig, to_toml
from distcnn.data.loader import Loader, Tile, training_requests
from distcnn.data.order import EpochOrder, sample_of
from distcnn.distill import Teacher, load_teacher
from distcnn.files import write_atomically
from distcnn.layers import Examination, examine
from distcnn.results import versions
from distcnn.state import Position
from distcnn.tiles import blank, forward_seed

if TYPE_CHECKING:
    from distcnn.job import Job

FOLDER = "blackbox"
BOX, CONFIG, WEIGHTS = "box.json", "config.toml", "model.safetensors"
BOX_VERSION = 1
MAX_BOXES = 3  # of a run: the first ones tell most
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class BlackBox:
    """Remembers the last steps' losses, and writes a box when asked to. `lag`: steps until a rank learns of a step."""

    def __init__(self, lag: int) -> None:
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._steps: deque[tuple[Position, list[tuple[int, torch.Tensor]]]] = deque(maxlen=lag + 1)

    def tile(self, lane: int, loss: torch.Tensor) -> None:
        """A tile's share of the loss, a scalar on the device that nobody waits for."""
        self._losses.append((lane, loss.detach()))

    def step(self, position: Position) -> None:
        """The step at `position` has been made."""
        self._steps.append((position, self._losses))
        self._losses = []

    def write(self, job: Job) -> None:
        """Write the box of the last step that all ranks know of. All ranks call it, and none waits for another.

        A box more than MAX_BOXES, a full disk or any other trouble here leaves the run as it is.
        """
        position, losses = self._steps[0]
        folder = job.run / FOLDER / f"step_{position.total:08d}"
        others = [path for path in (job.run / FOLDER).glob("step_*") if path.name != folder.name]
        if len(others) >= MAX_BOXES:
            return
        what = f"step {position.total} was left out: its loss or gradient is not finite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report = _report(job, position, dict(losses))
            if job.is_main:
                _write_common(job, position, folder)
            rank = job.runtime.world.rank
            write_atomically(folder / f"rank_{rank}.json", _json(report))
        except (OSError, RuntimeError) as error:
            job.console.warn(f"{what}; no black box of it ({error})")
            return
        origin = next((f", first in {tile['origin']}" for tile in report["tiles"] if tile["origin"]), "")
        job.console.warn(f"{what}{origin}; 'distcnn replay {folder}' computes it again")


@dataclass(frozen=True)
class Workbench:
    """What computes the tiles of a step a second time, apart from the run."""

    config: TrainConfig
    dataset: Dataset
    model: nn.Module
    loader: Loader
    augment: Augment
    order: EpochOrder
    teacher: Teacher | None
    device: torch.device

    @staticmethod
    def build(
        config: TrainConfig, dataset: Dataset, weights: dict[str, torch.Tensor], epoch: int, device: torch.device
    ) -> Workbench:
        """With a model of its own; batch norm that is synchronised between processes here sees its tile alone."""
        model = make_model(config, dataset)
        model.load_state_dict(weights)
        loader = make_loader(config, dataset, config.data.train_split, True, 1, False)
        order = make_order(config, loader.reader.counts, epoch, make_balance(config, dataset, loader.reader))
        augment = make_augment(config, dataset)
        teacher = load_teacher(config, dataset, device)
        return Workbench(config, dataset, model.to(device).train(), loader, augment, order, teacher, device)

    def tiles(self, step: int, lanes: Iterable[int]) -> list[Tile]:
        """The tiles of some lanes at a step, decoded anew."""
        return next(self.loader.steps(training_requests(self.order, lanes, step)))

    def examine(self, tile: Tile) -> Examination:
        """Forward and backward of a tile as training does it; gradients add up in the model."""
        config = self.config
        samples = sum(self.order.tile_sizes(tile.request.step))
        x_NCHW, targets = self.augment(tile if len(tile.labels) else blank(tile), self.device, train=True)
        precision = config.run.mixed_precision
        autocast = torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "no")
        if self.teacher:
            with autocast:
                targets = self.teacher.teach(x_NCHW, targets)
        torch.manual_seed(forward_seed(config.run.seed, tile.request))
        criterion = make_loss(config, self.dataset, self.device)
        return examine(self.model, x_NCHW, targets, criterion, samples, autocast)

    def samples(self, tile: Tile) -> Iterator[dict[str, Any]]:
        """Each sample by name."""
        ids = tile.request.ids
        names = self.loader.reader.keys(ids)
        for number, label, (shard, key) in zip(sample_of(ids).tolist(), tile.labels.tolist(), names, strict=True):
            yield {"id": number, "shard": shard, "key": key, "label": label}


def _report(job: Job, position: Position, losses: dict[int, torch.Tensor]) -> dict[str, Any]:
    """What this rank knows of the step: its tiles, then and now."""
    world = job.runtime.world
    weights = {name: tensor.detach() for name, tensor in job.model.state_dict().items()}
    bench = Workbench.build(job.config, job.dataset, weights, position.epoch, job.runtime.device)
    tiles = []
    try:
        lanes = job.config.geometry.lanes_of(world.rank, world.size)
        for tile in bench.tiles(position.step, lanes):
            again = bench.examine(tile)
            lane = tile.request.lane
            tiles.append(
                {
                    "lane": lane,
                    "loss": float(losses[lane]) if lane in losses else None,
                    "loss_again": again.loss,
                    "origin": again.origin,
                    "samples": list(bench.samples(tile)),
                    "layers": [dataclasses.asdict(layer) for layer in again.layers],
                }
            )
    finally:
        bench.loader.close()
    return {"rank": world.rank, "host": platform.node(), "device": str(job.runtime.device), "tiles": tiles}


def _write_common(job: Job, position: Position, folder: Path) -> None:
    """Rank 0's part of a box."""
    latest = job.run / CHECKPOINTS / "latest"
    box = {
        "version": BOX_VERSION,
        "position": dataclasses.asdict(position),
        "fingerprint": job.identity.fingerprint,
        "world_size": job.runtime.world.size,
        "weights_after_steps": job.position.total - position.total - 1,  # 0: they are those before the step
        "checkpoint": latest.resolve().name if latest.is_symlink() else "",
        "versions": versions(),
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in job.model.state_dict().items()}
    write_atomically(folder / WEIGHTS, safetensors.torch.save(weights))
    write_atomically(folder / CONFIG, to_toml(job.config).encode())
    write_atomically(folder / BOX, _json(box))


def _json(document: Any) -> bytes:
    """JSON in which what is not finite is text: "nan", "inf"."""
    return (json.dumps(_plain(document), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
