"""Make a data set (shards and dataset.json) of images.

Images stay byte for byte what they are, but for --max-side and --format; GIF, BMP and TIFF become PNG (the first
frame); images that EXIF says to turn are turned (--exif). Each is decoded once: what cannot be is left out and named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from distcnn.data.prepare.build import Settings
    from distcnn.data.prepare.pool import Pool
    from distcnn.data.prepare.source import Source


@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every source."""

    output: Path
    """Folder of the data set to be: dataset.json, shards, indexes"""
    val_fraction: float | None = None
    """Part of the images that becomes the split val, the classes in proportion (default: 0.1; none where the source
    has a train split of its own, from which it is taken if you ask for it)"""
    test_fraction: float = 0.0
    """Part that becomes the split test"""
    seed: int = 0
    """Of the split, and of the order of samples in the shards"""
    format: Literal["keep", "jpg", "png", "webp"] = "keep"
    """keep: images stay byte for byte what they are; else all become this"""
    max_side: int = 0
    """Larger images are scaled down until neither side is longer, in pixels (0: none are)"""
    quality: int = 90
    """1 to 100, of JPEG and WebP that are encoded again"""
    exif: Literal["apply", "ignore"] = "apply"
    """apply: an image that EXIF says to turn or mirror is stored upright, encoded again (training never looks at EXIF);
    ignore: it is kept as its pixels lie"""
    shard_samples: int = 5000
    """A shard holds at most so many samples"""
    shard_bytes: int = 128 << 20
    """and is full once it has so many bytes"""
    max_bad: float = 0.01
    """Stop when more images than this cannot be used: under 1 a part of all (but 10 are always allowed), from 1 a
    number, 0 none. Those left out are named in dataset.json"""
    workers: int = 0
    """Processes (0: one a core)"""
    overwrite: bool = False
    """Replace another data set in the output folder"""


@dataclass(frozen=True)
class Folder(Common):
    """A folder per class; or train/, val/ (valid/, validation/) and test/ with a folder per class in each."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The folder"""


@dataclass(frozen=True)
class Csv(Common):
    """A table (CSV or TSV with a header) of names and classes beside a folder of images."""

    file: Annotated[Path, tyro.conf.Positional]
    """The table"""
    images: Path
    """Folder of the images, at any depth; the table may leave folders and extensions out"""
    image_column: str = "id"
    """Column of the images' names"""
    label_column: str = "label"
    """Column of the classes, text or numbers"""
    group_column: str = ""
    """Column whose equal values stay in one split, such as a patient or a photographer"""
    test_csv: Path | None = None
    """Table of images to predict: they become the split test, without labels"""
    test_images: Path | None = None
    """Their folder, if it is another"""
    encoding: str = "utf-8"
    """Of the tables"""


@dataclass(frozen=True)
class Arrays(Common):
    """Arrays in a .npz file: images and labels, or x_train, y_train, x_test ..., or train_images, train_labels ..."""

    file: Annotated[Path, tyro.conf.Positional]
    """The file. Images (N, H, W), (N, H, W, 3) or (N, 3, H, W), 0..255 or floats 0..1; labels integers or text"""


@dataclass(frozen=True)
class Idx(Common):
    """IDX files, .gz or unpacked: MNIST, Fashion-MNIST (told apart by checksum) and others of the kind."""

    images: Annotated[Path, tyro.conf.Positional]
    """Such as train-images-idx3-ubyte.gz"""
    labels: Annotated[Path, tyro.conf.Positional]
    """Such as train-labels-idx1-ubyte.gz"""
    test_images: Path | None = None
    """Such as t10k-images-idx3-ubyte.gz: become the split test"""
    test_labels: Path | None = None
    """Such as t10k-labels-idx1-ubyte.gz"""


@dataclass(frozen=True)
class Digits(Common):
    """scikit-learn's digits: 1797 images of 8x8 pixels in 10 classes; nothing is downloaded."""

    val_fraction: float | None = 0.2
    """Part of the images that becomes the split val, the classes in proportion"""


@dataclass(frozen=True)
class Torchvision(Common):
    """A classification set of torchvision.datasets: CIFAR10, FashionMNIST, Flowers102 ..."""

    name: Annotated[str, tyro.conf.Positional]
    """Its name there"""
    root: Path
    """Folder into which it was downloaded"""
    download: bool = False
    """Download it if it is not there"""


@dataclass(frozen=True)
class Parquet(Common):
    """Parquet files of images and labels, as on the Hugging Face hub. Needs distcnn[parquet]."""

    source: Annotated[Path, tyro.conf.Positional]
    """A .parquet file, or a folder of them; train-*, validation-* and test-* keep their splits"""
    image_column: str = "image"
    """Column of the images: bytes, or {bytes, path}"""
    label_column: str = "label"
    """Column of the labels: integers or text"""


Options = (
    Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Csv, tyro.conf.subcommand("csv")]
    | Annotated[Arrays, tyro.conf.subcommand("arrays")]
    | Annotated[Idx, tyro.conf.subcommand("idx")]
    | Annotated[Digits, tyro.conf.subcommand("digits")]
    | Annotated[Torchvision, tyro.conf.subcommand("torchvision")]
    | Annotated[Parquet, tyro.conf.subcommand("parquet")]
)
Chosen = Folder | Csv | Arrays | Idx | Digits | Torchvision | Parquet


def run(options: Chosen) -> int:
    """Prepare, with progress; print a summary."""
    from distcnn.console import rich_console
    from distcnn.data.prepare.build import build
    from distcnn.data.prepare.display import Display, show
    from distcnn.data.prepare.pool import Pool, usable_cores, warm_up

    settings = _settings(options)
    workers = options.workers or usable_cores()
    if workers > 1 and not isinstance(options, Digits):
        warm_up()
    console = rich_console(highlight=True)
    with Pool(workers) as pool:
        source = _source(options, pool)
        with Display(console) as display:
            outcome = build(source, options.output, settings, display.report, options.overwrite, pool)
    show(outcome, str(options.output), console)
    return 0


def _settings(options: Common) -> Settings:
    from distcnn.data.prepare.build import Settings
    from distcnn.data.prepare.images import Policy
    from distcnn.data.prepare.writer import Limits

    return Settings(
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
        policy=Policy(options.format, options.max_side, options.quality, options.exif),
        limits=Limits(options.shard_samples, options.shard_bytes),
        max_bad=options.max_bad,
        workers=options.workers,
    )


def _source(options: Chosen, pool: Pool) -> Source:
    if isinstance(options, Folder):
        from distcnn.data.prepare.folders import from_folder

        return from_folder(options.directory, pool)
    if isinstance(options, Csv):
        from distcnn.data.prepare.tables import Columns, from_csv

        columns = Columns(options.image_column, options.label_column, options.group_column)
        return from_csv(options.file, options.images, columns, options.test_csv, options.test_images, options.encoding)
    if isinstance(options, Arrays):
        from distcnn.data.prepare.arrays import from_npz

        return from_npz(options.file)
    if isinstance(options, Idx):
        from distcnn.data.prepare.idx import from_idx

        return from_idx(options.images, options.labels, options.test_images, options.test_labels)
    if isinstance(options, Torchvision):
        from distcnn.data.prepare.torchvision_sets import from_torchvision

        return from_torchvision(options.name, options.root, options.download)
    if isinstance(options, Parquet):
        from distcnn.data.prepare.parquet import from_parquet

        return from_parquet(options.source, options.image_column, options.label_column)
    from distcnn.data.prepare.arrays import from_digits

    return from_digits()
