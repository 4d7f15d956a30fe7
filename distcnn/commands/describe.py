"""See a network before it is trained: layers with shapes, parameters, multiply-adds, receptive field, memory.

distcnn describe                                                    the network that train.py trains by default
distcnn describe --channels 32 64 128 --image-size 32 --norm none   one of your own
distcnn describe --data data/photos --model resnet18                for the classes and the size of a data set

Beside it stands a fully connected net on the same input. No weights are allocated; --config FILE.toml sets defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distcnn.config import ModelConfig, OptimConfig, RunConfig, TrainConfig, load_toml, take_config
from distcnn.errors import UserError

DIGITS_SIZE, USUAL_SIZE = 8, 224  # pixels


@dataclass(frozen=True)
class Options:
    """The network's input and output, and the model flags of train."""

    data: Path | None = None
    """Data set whose classes and image size are taken"""
    image_size: int = 0
    """Side of the square input in pixels. 0: that of --data, else 8 for cnn (the digits) and 224 for others"""
    classes: int = 0
    """Classes. 0: those of --data, else 10"""
    tile_size: int = 8
    """Images of the training pass whose activations are counted"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Type of those activations"""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        for name, least in (("image_size", 0), ("classes", 0), ("tile_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}")


def parse(argv: Sequence[str]) -> Options:
    """The options of the flags, over those of --config FILE.toml that say what is trained."""
    from distcnn.flags import parse as parse_flags

    rest, file = take_config(list(argv))
    base = Options()
    if file:
        saved = load_toml(file)
        tile, precision = saved.optim.tile_size, saved.run.mixed_precision
        base = Options(saved.data.data, saved.data.image_size, 0, tile, precision, saved.model)
    options: Options = parse_flags(Options, rest, "distcnn describe", __doc__, default=base)
    return options


def run(options: Options) -> int:
    """Print the tables; 0."""
    from distcnn.describe import as_text, describe

    optim = OptimConfig(global_batch_size=options.tile_size, tile_size=options.tile_size)
    config = TrainConfig(model=options.model, optim=optim, run=RunConfig(mixed_precision=options.mixed_precision))
    classes, size = options.classes, options.image_size
    if options.data is not None and not (classes and size):
        from distcnn.data.manifest import load_manifest

        manifest = load_manifest(options.data)
        uniform = manifest.image.uniform
        classes = classes or len(manifest.classes)
        size = size or (uniform[0] if uniform and uniform[0] == uniform[1] else USUAL_SIZE)
    size = size or (DIGITS_SIZE if options.model.model == "cnn" else USUAL_SIZE)
    print(as_text(describe(config, classes or 10, size)))
    return 0
