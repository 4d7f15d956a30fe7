"""Train a CNN. Without flags: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distcnn.config import TrainConfig, parse_train
from distcnn.errors import EXIT_PREEMPTED


def parse(argv: Sequence[str]) -> TrainConfig:
    """The config of the flags, over --config FILE.toml."""
    return parse_train(argv)


def run(options: TrainConfig) -> int:
    """Train; 0 when the run is complete, 75 when it was asked to stop and has saved itself."""
    from distcnn.launchers import become_torchrun, end_with_launcher, forgotten_processes
    from distcnn.world import read_world

    end_with_launcher()
    processes = forgotten_processes()
    if processes:
        become_torchrun(processes, sys.argv)
    world = read_world()

    from distcnn.preempt import Preempted
    from distcnn.train import train

    try:
        train(options, world)
    except Preempted:
        return EXIT_PREEMPTED
    return 0
