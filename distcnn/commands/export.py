"""A checkpoint for use elsewhere, checked against the original on real images.

  distcnn export runs/x --format onnx --output model.onnx
Inputs are (n, 3, S, S) uint8 RGB, the normalisation is inside, the outputs are logits; classes.json lies beside it.
safetensors are the plain weights, by the names of torchvision (or of distcnn's own networks).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    """What is exported, and how."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint or run folder."""
    output: Path
    """The file that is written."""
    format: Literal["torchscript", "onnx", "exported-program", "safetensors"] = "exported-program"
    """onnx needs the extra: pip install 'distcnn[onnx]'."""
    ema: bool = True
    """Use the averaged weights where there are any."""
    data: Path | None = None
    """Data set whose first images check the file; the one of the training run if not given."""
    tolerance: float = 1e-3
    """Largest difference of a logit from the checkpoint's; above it the export fails and nothing is written."""


def run(options: Options) -> int:
    """Export; 0 when the file is written and agrees, 1 when it does not agree."""
    from distcnn.export import export

    return export(options)
