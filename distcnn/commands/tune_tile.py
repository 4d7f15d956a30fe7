"""Measure speed and memory of training steps by tile size, on this machine's GPU or CPU. Takes the flags of train.

A tile is what one forward pass sees, and --global-batch-size / --tile-size the largest number of processes. Small
tiles leave a GPU idle; large ones take memory. Nothing is trained, and no run is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distcnn.config import TrainConfig, load_toml, take_config
from distcnn.errors import EXIT_FAILED, UserError
from distcnn.files import binary_size
from distcnn.flags import parse as parse_flags

if TYPE_CHECKING:
    from distcnn.tune.tile import Measured


@dataclass(frozen=True)
class Options:
    """The measurement, and the flags of train."""

    seconds: float = 2.0
    """Of each tile size, about"""
    plot: Path = Path("tune-tile.png")
    """The picture; the numbers stand beside it in a .json"""
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds {self.seconds}: must be positive")
        if self.plot.suffix.lower() != ".png":
            raise UserError(f"--plot {self.plot}: the picture is a .png")


def parse(argv: Sequence[str]) -> Options:
    """The options of the flags, over --config FILE.toml."""
    rest, file = take_config(list(argv))
    base = Options(config=load_toml(file) if file else TrainConfig())
    options: Options = parse_flags(Options, rest, "distcnn tune-tile", __doc__, default=base)
    return options


def run(options: Options) -> int:
    """Measure, print, write; 0, or 1 where no tile fits into memory."""
    from distcnn.build import open_dataset
    from distcnn.files import write_atomically
    from distcnn.tune.tile import draw, measure, suggest, tile_sizes
    from distcnn.tune.trial import one_process

    if not options.plot.parent.is_dir():
        raise UserError(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    config, world = options.config, one_process()
    dataset = open_dataset(config, world)
    print(f"{config.model.model} at {dataset.size} px, steps of {config.optim.global_batch_size} images, one process")
    print(f"{'tile':>6}{'lanes':>8}{'images/s':>12}{'memory':>12}")
    rows: list[Measured] = []
    for tile in tile_sizes(config.optim.global_batch_size):
        rows.append(measure(config, dataset, world, tile, options.seconds))
        _print_row(rows[-1])
        if not rows[-1].images_per_second:
            break  # larger ones take more
    chosen = suggest(rows)
    _advise(rows, chosen, config)
    write_atomically(options.plot, draw(rows, chosen, config.optim.tile_size))
    write_atomically(options.plot.with_suffix(".json"), _json(rows, chosen, config))
    print(f"written: {options.plot}, {options.plot.with_suffix('.json')}")
    return 0 if chosen else EXIT_FAILED


def _print_row(row: Measured) -> None:
    speed = row.images_per_second
    made = "no memory" if not speed else f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
    memory = binary_size(row.memory_bytes) if row.memory_bytes else "-"
    print(f"{row.tile:>6}{row.lanes:>8}{made:>12}{memory:>12}", flush=True)


def _advise(rows: Sequence[Measured], chosen: Measured | None, config: TrainConfig) -> None:
    from distcnn.tune.tile import NOISY, RULE

    worst = max(row.spread for row in rows)
    if worst > NOISY:
        print(
            f"warning: steps that are the same took up to {worst:.0%} longer than the fastest: something else uses"
            " this machine, measure again when it is idle"
        )
    if chosen is None:
        print("suggested  none: not even a tile of 1 fits into memory; a smaller --image-size or --model would")
        return
    print(f"suggested  --tile-size {chosen.tile}  ({RULE}; now {config.optim.tile_size})")
    if config.model.batch_norm == "tile":
        print(
            "Where the network has batch norm, a tile is normalised by its own statistics: another tile size is another"
            "\ntraining with another result, and is refused when a run is resumed. Choose it before you compare runs."
        )


def _json(rows: Sequence[Measured], chosen: Measured | None, config: TrainConfig) -> bytes:
    import dataclasses
    import json

    from distcnn.config import flatten
    from distcnn.tune.tile import RULE

    document = {
        "suggestion": chosen.tile if chosen else None,
        "rule": RULE,
        "rows": [dataclasses.asdict(row) for row in rows],
        "config": flatten(config),
    }
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
