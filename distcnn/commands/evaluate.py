"""Exact metrics of a checkpoint on a labelled split, from any number of processes; two checkpoints compared.

distcnn evaluate runs/x --data data/photos --split test
distcnn evaluate runs/x --data data/photos --compare runs/y --predictions rows.csv --tta flip
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from distcnn.config import TestTimeViews


@dataclass(frozen=True)
class Options:
    """What is evaluated, on what, and what is written."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint or run folder."""
    data: Path
    """Folder of a prepared data set."""
    split: str = "val"
    """A labelled split of it."""
    compare: Path | None = None
    """A second checkpoint: its metrics, too, and McNemar's test of the difference."""
    ema: bool = True
    """Use the averaged weights where there are any."""
    tta: TestTimeViews = "none"
    """Average the logits: flip: over each image and its mirror image; flip-shift: also shifted, 6 views in all."""
    output: Path | None = None
    """Write all metrics to this JSON file."""
    predictions: Path | None = None
    """Write a row for each sample to this CSV file: shard, key, label, prediction, probability, loss."""
    threads: int = 2
    """Threads that read and decode, per process."""


def run(options: Options) -> int:
    """Evaluate; 0 when done."""
    from distcnn.scoring import score

    return score(options)
