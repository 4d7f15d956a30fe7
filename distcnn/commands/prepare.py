"""Make a data set (shards and dataset.json) of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every source."""

    output: Path
    """Folder of the data set: dataset.json, shards, indexes"""
    val_fraction: float = 0.1
    """Part of the images that becomes the split val, the classes in proportion"""
    test_fraction: float = 0.0
    """Part that becomes the split test"""
    seed: int = 0
    """Of the split and of the order of the samples in the shards"""
    overwrite: bool = False
    """Replace another data set in the output folder"""


@dataclass(frozen=True)
class Folder(Common):
    """A folder per class; or train/, val/ and test/ with a folder per class in each."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The folder"""


@dataclass(frozen=True, kw_only=True)
class Digits(Common):
    """scikit-learn's digits: 1797 images of 8x8 pixels in 10 classes; nothing is downloaded."""

    val_fraction: float = 0.2


Options = Annotated[Folder, tyro.conf.subcommand("folder")] | Annotated[Digits, tyro.conf.subcommand("digits")]


def run(options: Folder | Digits) -> int:
    """Prepare; print what came out."""
    from distcnn.data.prepare.arrays import from_digits
    from distcnn.data.prepare.build import Settings, build
    from distcnn.data.prepare.folders import from_folder
    from distcnn.data.prepare.split import Fractions

    source = from_digits() if isinstance(options, Digits) else from_folder(options.directory)
    settings = Settings(fractions=Fractions(options.val_fraction, options.test_fraction), seed=options.seed)
    outcome = build(source, options.output, settings, overwrite=options.overwrite)
    for name, split in outcome.manifest.splits.items():
        print(f"{name:<6} {split.samples:>9,} images in {len(split.shards)} shards")
    print(f"next: distcnn inspect {options.output}; distcnn train --data {options.output}")
    return 0
