"""Find a learning rate: a range test on your own config. Takes the flags of train, and leaves no run behind.

Trains for a few dozen steps while the rate rises, prints where the loss falls and breaks, and draws it. The same from
any number of processes, so one is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distcnn.config import TrainConfig, flatten, load_toml, take_config
from distcnn.errors import EXIT_FAILED, UserError
from distcnn.flags import parse as parse_flags

if TYPE_CHECKING:
    from distcnn.tune.rate import RangeTest


@dataclass(frozen=True)
class Options:
    """The test, and the flags of train."""

    steps: int = 80
    """Steps at most"""
    lowest_lr: float = 1e-6
    """Rate of the first step"""
    highest_lr: float = 10.0
    """Rate of the last step, if it comes so far"""
    plot: Path = Path("tune-lr.png")
    """The picture; the numbers stand beside it in a .json"""
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.steps < 10:
            raise UserError(f"--steps {self.steps}: at least 10")
        if not 0 < self.lowest_lr < self.highest_lr < float("inf"):
            raise UserError(f"--lowest-lr {self.lowest_lr}: must be positive and below --highest-lr {self.highest_lr}")
        if self.plot.suffix.lower() != ".png":
            raise UserError(f"--plot {self.plot}: the picture is a .png")


def parse(argv: Sequence[str]) -> Options:
    """The options of the flags, over --config FILE.toml."""
    rest, file = take_config(list(argv))
    base = Options(config=load_toml(file) if file else TrainConfig())
    options: Options = parse_flags(Options, rest, "distcnn tune-lr", __doc__, default=base)
    return options


def run(options: Options) -> int:
    """Test, print, write; 0, or 1 where no rate can be suggested."""
    from distcnn.build import open_dataset
    from distcnn.console import Console
    from distcnn.files import write_atomically
    from distcnn.tune.rate import draw, range_test
    from distcnn.tune.trial import one_process, trial_job

    if not options.plot.parent.is_dir():
        raise UserError(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    config, world = options.config, one_process()
    dataset = open_dataset(config, world)
    console = Console(True, config.run.quiet)
    with trial_job(config, dataset, world) as job, console.progress("range test", options.steps) as advance:
        found = range_test(job, options.steps, options.lowest_lr, options.highest_lr, advance)
    if len(found.losses) < 3:
        raise UserError(f"the loss breaks within {len(found.losses)} steps, at {options.lowest_lr:g}: --lowest-lr")
    _say(found, options)
    write_atomically(options.plot, draw(found, config.optim.lr))
    write_atomically(options.plot.with_suffix(".json"), _json(found, config))
    print(f"written: {options.plot}, {options.plot.with_suffix('.json')}")
    return 0 if found.suggestion else EXIT_FAILED


def _say(found: RangeTest, options: Options) -> None:
    from distcnn.tune.rate import RULE

    curve, optim = found.smoothed, options.config.optim
    end = "where it diverged" if found.diverged else "the highest rate asked for"
    print(f"{len(found.losses)} steps of {optim.global_batch_size} images, rates {found.rates[0]:.1e} to", end=" ")
    print(f"{found.rates[-1]:.1e}, {end}")
    print(f"loss       {curve[0]:.3f} at first, lowest {curve.min():.3f} at {found.lowest:.1e} (smoothed)")
    print(f"steepest   {found.steepest:.1e}, where it falls fastest; edge {found.edge:.1e}, where it leaves the bottom")
    if found.suggestion is None:
        print("suggested  none: the loss hardly fell; more --steps, or look at the data with distcnn inspect")
        return
    print(f"suggested  --lr {found.suggestion:g}  ({RULE}; now {optim.lr:g})")
    print(
        f"It holds for {optim.optimizer} with --global-batch-size {optim.global_batch_size} and --tile-size"
        f" {optim.tile_size}: after a change of these, test again."
    )


def _json(found: RangeTest, config: TrainConfig) -> bytes:
    import json

    from distcnn.tune.rate import RULE

    document = {
        "suggestion": found.suggestion,
        "rule": RULE,
        "lowest": found.lowest,
        "steepest": found.steepest,
        "edge": found.edge,
        "diverged": found.diverged,
        "rates": found.rates.tolist(),
        "losses": found.losses.tolist(),
        "smoothed": found.smoothed.tolist(),
        "config": flatten(config),
    }
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
