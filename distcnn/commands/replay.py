"""Compute a step again whose loss or gradient was not finite, from the box that the run left under blackbox/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from distcnn.replay import Replay


@dataclass(frozen=True)
class Options:
    """One process, on the CPU; nothing of the run is changed."""

    box: Annotated[Path, tyro.conf.Positional]
    """Such as runs/x/blackbox/step_00000123"""
    data: Path | None = None
    """Where the data set is, if it is no longer where the run had it"""


def run(options: Options) -> int:
    """Compute, print the tables and what they say."""
    from distcnn.replay import replay

    _show(replay(options.box, options.data))
    return 0


def _show(found: Replay) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    at = found.box.position
    title = f"step {at.total} (epoch {at.epoch + 1}, step {at.step}), each tile's share of the loss"
    tiles = Table(title=Text(title), title_justify="left")
    for column in ("lane", "rank", "then", "now", "first not finite"):
        tiles.add_column(column)
    for tile in found.tiles:
        then = "" if tile.then is None else f"{tile.then:.6g}"
        rank = "" if tile.rank is None else str(tile.rank)
        tiles.add_row(str(tile.lane), rank, then, f"{tile.now.loss:.6g}", Text(tile.now.origin))
    console.print(tiles)
    worst = found.worst
    layers = Table(
        title=Text(f"lane {worst.lane}, layer by layer: L2 norms, and how many values are not finite"),
        title_justify="left",
    )
    layers.add_column("layer", overflow="fold")
    layers.add_column("kind", overflow="fold")
    for column in ("output", "largest", "bad", "weights", "gradient", "bad"):
        layers.add_column(column, justify="right")
    for layer in worst.now.layers:
        numbers = [f"{value:.4g}" for value in (layer.output_norm, layer.output_max)]
        after = [f"{value:.4g}" for value in (layer.weight_norm, layer.gradient_norm)]
        bad = [str(count) if count else "" for count in (layer.bad_outputs, layer.bad_gradients)]
        layers.add_row(Text(layer.name), Text(layer.kind), *numbers, bad[0], *after, bad[1])
    console.print(layers)
    console.print(Text("samples of that tile: " + ", ".join(worst.keys)))
    console.print(Text(f"loss {found.loss:.6g}, gradient norm {found.gradient_norm:.6g}"))
    console.print(Text(found.verdict()))
