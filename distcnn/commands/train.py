"""Train a CNN. Without flags: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distcnn.config import TrainConfig, parse_train


def parse(argv: Sequence[str]) -> TrainConfig:
    """The config of the flags, over --config FILE.toml."""
    return parse_train(argv)


def run(options: TrainConfig) -> int:
    """Train; 0 when the run is complete."""
    from distcnn.launchers import become_torchrun, forgotten_processes
    from distcnn.world import read_world

    processes = forgotten_processes()
    if processes:
        become_torchrun(processes, sys.argv)
    world = read_world()

    from distcnn.train import train

    train(options, world)
    return 0
