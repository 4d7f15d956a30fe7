"""A step of a black box once more: all its tiles in one process on the CPU, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from distcnn.blackbox import BOX, BOX_VERSION, CONFIG, WEIGHTS, Workbench
from distcnn.build import open_dataset
from distcnn.config import load_toml
from distcnn.errors import DataError, UserError
from distcnn.layers import Examination
from distcnn.state import Position
from distcnn.world import World


@dataclass(frozen=True)
class Box:
    """What box.json says."""

    position: Position
    fingerprint: str
    weights_after_steps: int  # 0: the weights are those before the step
    checkpoint: str

    @staticmethod
    def read(folder: Path) -> Box:
        """Raises UserError for a folder that is no box, or one of another version."""
        row = _read(folder / BOX)
        if row.get("version") != BOX_VERSION:
            raise UserError(f"{folder / BOX} has version {row.get('version')}, this program reads {BOX_VERSION}")
        try:
            at = Position(**{name: int(value) for name, value in row["position"].items()})
            return Box(at, str(row["fingerprint"]), int(row["weights_after_steps"]), str(row["checkpoint"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / BOX} is damaged: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class TileAgain:
    """A tile then and now. Losses are shares of the step's mean loss; `then` is None where its rank left no word."""

    lane: int
    rank: int | None
    then: float | None
    now: Examination
    keys: tuple[str, ...]  # shard and key of each sample


@dataclass(frozen=True)
class Replay:
    """A step computed again. `gradient_norm` is that of the sum over all tiles."""

    box: Box
    tiles: tuple[TileAgain, ...]
    gradient_norm: float

    @property
    def loss(self) -> float:
        """The step's mean loss."""
        return sum(tile.now.loss for tile in self.tiles)

    @property
    def reproduced(self) -> bool:
        """Whether the step is not finite here either."""
        return not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm))

    @property
    def worst(self) -> TileAgain:
        """The tile to look at: the first one that is not finite now, else then, else the first."""
        order = [tile for tile in self.tiles if tile.now.origin]
        order += [tile for tile in self.tiles if tile.then is not None and not math.isfinite(tile.then)]
        return [*order, *self.tiles][0]

    def verdict(self) -> str:
        """One sentence: what this says of the cause."""
        then = [tile for tile in self.tiles if tile.then is not None and not math.isfinite(tile.then)]
        where = "; ".join(f"lane {tile.lane} of rank {tile.rank}" for tile in then)
        if self.reproduced:
            origin = self.worst.now.origin or "the sum over the tiles: each is finite by itself"
            return f"reproduced: not finite here either, first in {origin}"
        if self.box.weights_after_steps:
            return (
                f"not reproduced, but the weights are those {self.box.weights_after_steps} steps later: go on from"
                f" {self.box.checkpoint or 'the beginning'} with --device cpu to see the step itself"
            )
        if then:
            return (
                f"not reproduced: the loss was not finite in {where}, and is here, with the same weights and samples."
                " So it came from that process: its hardware, driver, precision, or a kernel that is not deterministic"
            )
        return "not reproduced: the gradient was not finite there and is here: precision, hardware or a kernel"


def replay(folder: Path, data: Path | None = None) -> Replay:
    """Compute the step of a box again. `data`: where the data set lies now, if it has moved.

    Raises UserError for a folder that is no box, DataError if the data set is another one.
    """
    box = Box.read(folder)
    config = load_toml(folder / CONFIG)
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    dataset = open_dataset(config, World())
    if dataset.manifest.fingerprint() != box.fingerprint:
        raise DataError(f"{config.data.data} is not the data set of the step (--data says where that is)")
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    torch.set_num_threads(config.run.threads or 1)
    then = _losses_then(folder)
    at = box.position
    bench = Workbench.build(config, dataset, weights, at.epoch, torch.device("cpu"))
    try:
        tiles = []
        for tile in bench.tiles(at.step, range(config.geometry.lanes)):
            lane = tile.request.lane
            names = tuple(f"{row['shard']} {row['key']}" for row in bench.samples(tile))
            rank, loss = then.get(lane, (None, None))
            tiles.append(TileAgain(lane, rank, loss, bench.examine(tile), names))
    finally:
        bench.loader.close()
    gradients = [p.grad for p in bench.model.parameters() if p.grad is not None]
    return Replay(box, tuple(tiles), nn.utils.get_total_norm(gradients).item())


def _losses_then(folder: Path) -> dict[int, tuple[int, float | None]]:
    """lane -> (rank, loss as it was in training)."""
    found: dict[int, tuple[int, float | None]] = {}
    for path in sorted(folder.glob("rank_*.json")):
        report = _read(path)
        for tile in report["tiles"]:
            found[tile["lane"]] = report["rank"], None if tile["loss"] is None else float(tile["loss"])
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path.parent} is no black box: {path.name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is damaged: not an object")
    return document
