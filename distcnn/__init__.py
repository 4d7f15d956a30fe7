"""Train CNN image classifiers on one CPU, on many GPUs and on SLURM clusters, as the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from distcnn.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def load_model(path: str | Path, ema: bool = True, device: str = "cpu") -> Classifier:
    """A trained network with its classes and preprocessing, of a checkpoint or run folder: see distcnn.classifier."""
    from distcnn.classifier import load_model as load

    return load(path, ema, device)
