"""Train a CNN. Without flags: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence

from distcnn.config import TrainConfig, parse_train


def parse(argv: Sequence[str]) -> TrainConfig:
    return parse_train(argv)


def run(options: TrainConfig) -> int:
    """Train; 0 when the run is complete."""
    from distcnn.world import read_world

    world = read_world()
    from distcnn.train import train

    train(options, world)
    return 0
