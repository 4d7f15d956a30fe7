"""From a config and a manifest to what a run is made of: loaders, augmentation, model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from distcnn.augment import IMAGENET_MEAN, IMAGENET_STD, Augment
from distcnn.config import DataConfig, TrainConfig, augmentations
from distcnn.data import shared
from distcnn.data.balance import KINDS, Balance
from distcnn.data.loader import Loader
from distcnn.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from distcnn.data.order import EpochOrder, Ids
from distcnn.data.readers import Reader
from distcnn.data.shards import SplitReader
from distcnn.data.upload import CPU
from distcnn.data.views import ProgressiveView, View
from distcnn.errors import DataError, UserError
from distcnn.losses import Loss, balanced_weights
from distcnn.models import build_model
from distcnn.pretrained import normalisation_of
from distcnn.world import World

CACHE_BYTES = 1 << 30
DEFAULT_SIZE = 224
TINY_TILE_PIXELS = 4096  # below this, handing work to a second thread costs as much as it saves
WAIT_SECONDS = 120
PREFETCH_STEPS = 3


@dataclass(frozen=True)
class Dataset:
    """A data set as a config uses it: sizes resolved, splits checked."""

    root: Path
    manifest: Manifest
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes


def open_dataset(config: TrainConfig, world: World) -> Dataset:
    """The data set of a config. The default one, the digits, is prepared by rank 0 if it is missing.

    Raises DataError for a set that is missing, damaged, empty, or without the labelled splits that the config names.
    """
    data = config.data
    if data.data == DataConfig().data and not (data.data / MANIFEST_NAME).exists():
        _prepare_digits(data.data, world)
    manifest = load_manifest(data.data)
    for name in (data.train_split, data.val_split):
        if data.loader == "stream" and name == data.train_split and name not in manifest.splits:
            continue  # a pattern, or a command
        split = manifest.split(name)
        if not split.samples:
            raise DataError(f"{data.data}: split {name!r} is empty")
        if not split.labelled:
            raise DataError(f"{data.data}: split {name!r} has no labels, so it serves for prediction only")
    if len(manifest.classes) < 2:
        raise DataError(f"{data.data} has {len(manifest.classes)} class; a classifier needs at least 2")
    uniform = manifest.image.uniform
    own = uniform[0] if uniform and uniform[0] == uniform[1] else 0
    size = data.image_size or own or DEFAULT_SIZE
    return Dataset(data.data, manifest, size, *_normalisation(config, manifest))


def _normalisation(config: TrainConfig, manifest: Manifest) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): what pretrained weights were trained with, ImageNet's for a file of them; else the set's own."""
    if config.model.pretrained:
        return normalisation_of(Path(config.model.pretrained)) or (IMAGENET_MEAN, IMAGENET_STD)
    known = bool(manifest.image.mean) and min(manifest.image.std) > 0
    return (manifest.image.mean, manifest.image.std) if known else (IMAGENET_MEAN, IMAGENET_STD)


def _prepare_digits(root: Path, world: World) -> None:
    if world.is_main:
        from distcnn.data.prepare import prepare_digits

        prepare_digits(root)
        return
    deadline = time.monotonic() + WAIT_SECONDS
    while not (root / MANIFEST_NAME).exists():
        if time.monotonic() > deadline:
            raise DataError(
                f"{root} did not appear: run 'distcnn prepare digits --output {root}' where every node sees it"
            )
        time.sleep(0.1)


def make_view(config: TrainConfig, dataset: Dataset, train: bool) -> View:
    """The view that training or evaluation takes of an image."""
    uniform = dataset.manifest.image.uniform
    fits = uniform == (dataset.size, dataset.size)
    crop = config.data.crop
    if train and crop in ("pad", "translate", "none") and not fits:
        raise UserError(
            f"--crop {crop} needs images of {dataset.size}x{dataset.size} px, those of {dataset.root} are"
            f" {'of different sizes' if uniform is None else f'{uniform[1]}x{uniform[0]}'}:"
            " leave --crop out, or give their --image-size"
        )
    if train and config.data.progressive:
        return ProgressiveView.of(config.data.progressive, config.optim.epochs, config.data.crop_scale)
    if train and (crop == "random-resized" or not fits):
        return View(dataset.size, "random-resized", config.data.crop_scale)
    return View(dataset.size, "none" if fits else "center")


def make_loader(
    config: TrainConfig,
    dataset: Dataset,
    split: str,
    train: bool,
    threads: int,
    ahead: bool,
    device: torch.device = CPU,
) -> Loader:
    """A loader of a split. `ahead`: prepare steps while others are computed. `device`: where its tiles go."""
    uniform = dataset.manifest.image.uniform
    view = make_view(config, dataset, train)
    reader = SplitReader(dataset.root, dataset.manifest.split(split))
    cache_shape = None
    processes = config.data.decode_processes if train else 0
    if processes and reader.remote:
        raise UserError("--decode-processes needs local shards: leave it out, threads read remote ones ahead")
    if uniform is not None and config.data.cache != "off" and not processes:
        small = len(reader) * uniform[0] * uniform[1] * 3 <= CACHE_BYTES
        cache_shape = uniform if small or config.data.cache == "host" else None
    elif config.data.cache == "host":
        raise UserError(f"--cache host needs images of one size, those of {dataset.root} are not")
    # Without a GPU decoding and computing take turns: OpenMP's threads lose more by being disturbed.
    prefetch = PREFETCH_STEPS if ahead else 0
    # Reducing while decoding changes pixels: the set decides, not what happens to be cached.
    return Loader(reader, view, config.run.seed, threads, prefetch, cache_shape, uniform is None, device, processes)


def _check_processes(data: DataConfig) -> None:
    """Raises UserError where --decode-processes cannot be had."""
    for hinders, reason in (
        (data.loader != "exact", "needs --loader exact: a stream has processes of its own"),
        (data.decode != "cpu", "needs --decode cpu"),
        (data.cache == "host", "keeps no pixels: leave out --cache host"),
        (not shared.available(), "needs Linux: leave it out"),
    ):
        if data.decode_processes and hinders:
            raise UserError(f"--decode-processes {reason}")


def make_training_loader(
    config: TrainConfig, dataset: Dataset, world: World, threads: int, device: torch.device
) -> Loader:
    """The loader of the training split, or of the stream that stands in its place. `device`: where tiles go."""
    data = config.data
    _check_processes(data)
    if data.decode == "nvjpeg":
        from distcnn.data.nvjpeg import NvjpegLoader, check_decoder

        if data.loader != "exact":
            raise UserError("--decode nvjpeg needs --loader exact")
        check_decoder(device)
        reader = SplitReader(dataset.root, dataset.manifest.split(data.train_split))
        view = make_view(config, dataset, True)
        return NvjpegLoader(reader, view, config.run.seed, threads, PREFETCH_STEPS, device)
    if data.loader == "exact":
        return make_loader(config, dataset, data.train_split, True, threads, device.type != "cpu", device)
    from distcnn.data.stream import Stream, StreamLoader, stream_shards

    if data.progressive:
        raise UserError("--progressive needs --loader exact")
    shards = stream_shards(data.train_split, dataset.root, dataset.manifest, data.allow_pipe)
    split = dataset.manifest.splits.get(data.train_split)
    samples = data.stream_samples or (split.samples if split else 0)
    stream = Stream(tuple(shards), samples, len(dataset.classes), config.run.seed, world.rank)
    return StreamLoader(stream, make_view(config, dataset, True), threads)


def make_augment(config: TrainConfig, dataset: Dataset) -> Augment:
    """What happens to tiles on the device."""
    data, extra = config.data, augmentations(config.data)
    fits = dataset.manifest.image.uniform == (dataset.size, dataset.size)
    shifts = data.crop in ("pad", "translate") or (data.crop == "auto" and fits and not data.progressive)
    by_default: Literal["none", "random"] = "none" if dataset.manifest.image.grayscale else "random"
    return Augment(
        dataset.mean,
        dataset.std,
        config.run.seed,
        padding=(dataset.size // 8 if data.crop_padding < 0 else data.crop_padding) if shifts else 0,
        reflect=data.crop == "translate",
        flip=by_default if data.flip == "auto" else data.flip,
        trivial="trivial-augment" in extra,
        jitter=extra.get("color-jitter", 0.0),
        erasing=extra.get("erasing", 0.0),
        cutout=int(extra.get("cutout", 0)),
        mixup=config.optim.mixup,
        cutmix=config.optim.cutmix,
    )


def make_model(
    config: TrainConfig, dataset: Dataset, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
) -> nn.Module:
    """The model for the data set's classes and size, initialised by the seed alone."""
    return build_model(config.model, len(dataset.classes), dataset.size, config.run.seed, sum_over_ranks)


def make_loss(config: TrainConfig, dataset: Dataset, device: torch.device) -> Loss:
    """The training loss. Raises UserError where classes are to be balanced and their numbers are not known."""
    data, optim = config.data, config.optim
    weights = None
    _check_balance(config)
    if optim.balance in ("sqrt", "inverse"):
        counts = dataset.manifest.split(data.train_split).class_counts
        values = balanced_weights(counts, 1.0 if optim.balance == "inverse" else 0.5)
        weights = torch.tensor(values, dtype=torch.float32, device=device)
    return Loss(optim.loss, optim.label_smoothing, weights, optim.distill_weight, optim.distill_temperature)


def _check_balance(config: TrainConfig) -> None:
    if config.optim.balance != "none" and config.data.loader == "stream":
        raise UserError("--balance needs --loader exact: of a stream nobody knows how many images a class has")


def make_balance(config: TrainConfig, dataset: Dataset, reader: Reader) -> Balance | None:
    """How often each sample of the training split, which `reader` reads, comes in an epoch; None for once.

    Raises UserError for a stream.
    """
    _check_balance(config)
    if config.optim.balance not in KINDS or not isinstance(reader, SplitReader):
        return None
    return Balance(reader.all_labels(), len(dataset.classes), config.optim.balance, config.run.seed)


def make_order(config: TrainConfig, counts: Ids, epoch: int, balance: Balance | None = None) -> EpochOrder:
    """The order of an epoch of training, over shards of `counts` samples."""
    if balance:
        return balance.order(counts, config.geometry, config.run.seed, epoch, config.data.window_shards)
    return EpochOrder(counts, config.geometry, config.run.seed, epoch, config.data.window_shards)


def order_of(config: TrainConfig, dataset: Dataset, epoch: int = 0) -> EpochOrder:
    """The order of an epoch of the config's training split."""
    reader = SplitReader(dataset.root, dataset.manifest.split(config.data.train_split))
    try:
        return make_order(config, reader.counts, epoch, make_balance(config, dataset, reader))
    finally:
        reader.close()


def compute_threads(config: TrainConfig, dataset: Dataset, world: World, cores: int) -> int:
    """Threads per process: as asked for, else the process's share of the cores, or 1 for tiny images."""
    if config.run.threads:
        return config.run.threads
    if config.optim.tile_size * dataset.size**2 < TINY_TILE_PIXELS:
        return 1
    return max(cores // world.local_size, 1)
