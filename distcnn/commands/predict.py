"""Predict images: a table with class and probability of each, in the order of the input.

distcnn predict runs/x photos/ more.jpg --output predictions.csv
distcnn predict runs/x test.csv --images test/ --output submission.csv     an unlabelled table in, a filled one out
distcnn predict runs/x data/photos --split test                            a prepared data set
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distcnn.config import TestTimeViews


@dataclass(frozen=True)
class Options:
    """What is predicted, by which checkpoint, and where the table goes."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint or run folder."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders, tar shards, one CSV or TSV, or one data set folder."""
    output: Path = Path("predictions.csv")
    """The table that is written; .json for JSON."""
    top_k: int = 1
    """Classes per image."""
    images: Path | None = None
    """CSV: the folder of the images; the CSV's own folder if not given."""
    image_column: str = "id"
    """CSV: the column with the image names; the output's, too."""
    label_column: str = "label"
    """The output's column with the predicted class."""
    split: str = "test"
    """Data set: which split."""
    ema: bool = True
    """Use the averaged weights where there are any."""
    tta: TestTimeViews = "none"
    """Average over views: flip: each image and its mirror image; flip-shift: also shifted, 6 views in all."""
    threads: int = 2
    """Threads that read and decode, per process."""


def run(options: Options) -> int:
    """Predict; 0 even if some images could not be read (they are listed), 2 for unusable input."""
    from distcnn.predict import predict_table

    return predict_table(options)
