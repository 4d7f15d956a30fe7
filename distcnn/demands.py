"""What the values of a training run must satisfy, each with the line that says so. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distcnn.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

AUGMENTATIONS = "trivial-augment, color-jitter=0..1, erasing=0..1 (probability), cutout=1..1024 (pixels)"
_LARGEST = {"color-jitter": 1.0, "erasing": 1.0, "cutout": 1024.0}


def augmentation_of(word: str) -> tuple[str, float] | None:
    """(name, value) of a word of --augment; None if it is not one."""
    name, equals, text = word.partition("=")
    if name == "trivial-augment":
        return None if equals else (name, 1.0)
    try:
        value = float(text)
    except ValueError:
        return None
    whole = name != "cutout" or value.is_integer()
    return (name, value) if 0 < value <= _LARGEST.get(name, 0.0) and whole else None


LONGEST_TAG = 64  # characters that W&B takes
ALPHAS = (0.01, 4.0)  # beyond them nothing or everything is mixed, and draws from Beta by rejection take very long


Demand = tuple[bool, str, str]  # (holds, flag, what is demanded)


def demands(config: TrainConfig, flat: Mapping[str, Any]) -> Iterator[Demand]:
    """For every value that has limits. `flat`: all values by name."""
    for name, value in flat.items():
        text = value if isinstance(value, str) else ""
        yield text == text.encode("utf-8", "ignore").decode(), name, "must be UTF-8 text"
    yield from _of_data(config.data)
    yield from _of_model(config.model)
    yield from _of_optim(config.optim)
    yield from _of_run(config.run)
    for name, value in flat.items():
        yield not isinstance(value, float) or math.isfinite(value), name, "must be finite"


def _of_data(data: DataConfig) -> Iterator[Demand]:
    yield data.image_size >= 0, "image_size", "pixels, 0 for the data's own size"
    yield not data.progressive or min(data.progressive) > 0, "progressive", "positive numbers of pixels"
    resized = data.crop in ("auto", "random-resized")
    yield not data.progressive or resized, "progressive", f"goes with --crop random-resized, not with {data.crop}"
    yield data.crop_padding >= -1, "crop_padding", "pixels, -1 for an eighth of the side"
    yield 0 < data.crop_scale <= 1, "crop_scale", "must be in (0, 1]"
    wrong = next((word for word in data.augment if augmentation_of(word) is None), None)
    yield wrong is None, "augment", f"{wrong!r} is none of {AUGMENTATIONS}"
    once = len({word.partition("=")[0] for word in data.augment}) == len(data.augment)
    yield once, "augment", "each of them once"
    exact = data.loader == "exact"
    kept = data.decode == "nvjpeg" and data.cache == "host"
    yield not kept, "decode", "keeps no pixels in memory: --cache auto or off"
    yield not (exact and data.allow_pipe), "allow_pipe", "--loader stream only"
    yield not (exact and data.stream_samples), "stream_samples", "--loader stream only"
    yield data.stream_samples >= 0, "stream_samples", "must be >= 0 (0: as many as the split has)"
    yield data.decode_threads >= 0, "decode_threads", "must be >= 0 (0: automatic)"
    yield data.decode_processes >= 0, "decode_processes", "must be >= 0 (0: threads)"
    yield data.window_shards >= 0, "window_shards", "must be >= 0 (0: automatic)"


def _of_model(model: ModelConfig) -> Iterator[Demand]:
    yield bool(model.model), "model", "name a model: cnn, resnet18, ..."
    yield model.freeze == "none" or bool(model.pretrained), "freeze", "only with --pretrained"
    yield len(model.channels) > 0 and min(model.channels) > 0, "channels", "one or more positive numbers"
    yield model.kernel_size >= 1 and model.kernel_size % 2 == 1, "kernel_size", "must be odd and positive"
    yield model.hidden >= 0, "hidden", "must be >= 0"
    yield 0 <= model.dropout < 1, "dropout", "must be in [0, 1)"


def _of_optim(optim: OptimConfig) -> Iterator[Demand]:
    batch, tile = optim.global_batch_size, optim.tile_size
    yield optim.epochs >= 1, "epochs", "must be >= 1"
    yield batch >= 1, "global_batch_size", "must be >= 1"
    yield tile >= 1, "tile_size", "must be >= 1"
    below = f", {max(batch // tile, 1) * tile}" if tile >= 1 else ""
    yield batch % max(tile, 1) == 0, "global_batch_size", f"must be a multiple of --tile-size {tile}{below} for example"
    yield 0 < optim.lr < float("inf"), "lr", "must be positive"
    yield 0 < optim.layer_decay <= 1, "layer_decay", "must be in (0, 1]"
    yield 0 <= optim.momentum < 1, "momentum", "must be in [0, 1)"
    yield 0 <= optim.weight_decay < float("inf"), "weight_decay", "must be >= 0"
    yield 0 <= optim.warmup_epochs <= optim.epochs, "warmup_epochs", f"must be between 0 and --epochs {optim.epochs}"
    yield 0 < optim.distill_weight <= 1, "distill_weight", "must be in (0, 1]"
    yield 0.1 <= optim.distill_temperature <= 100, "distill_temperature", "must be in [0.1, 100]"
    yield 0 <= optim.label_smoothing < 1, "label_smoothing", "must be in [0, 1)"
    for name, alpha in (("mixup", optim.mixup), ("cutmix", optim.cutmix)):
        yield alpha == 0 or ALPHAS[0] <= alpha <= ALPHAS[1], name, f"0 (off), or {ALPHAS[0]} to {ALPHAS[1]}"
    yield 0 <= optim.ema_decay < 1, "ema_decay", "must be in [0, 1)"
    lookahead = optim.lookahead
    yield lookahead == 0 or lookahead >= 2, "lookahead", "a number of steps from 2 on (5 is usual), 0 for off"
    yield 0 <= optim.clip_grad_norm < float("inf"), "clip_grad_norm", "must be >= 0 (0: not clipped)"
    yield optim.patience >= 0, "patience", "must be >= 0 (0: never)"


def _of_run(run: RunConfig) -> Iterator[Demand]:
    yield 0 <= run.seed < 2**63, "seed", "must be in [0, 2**63)"
    yield run.threads >= 0, "threads", "must be >= 0 (0: automatic)"
    yield run.eval_every >= 1, "eval_every", "must be >= 1"
    yield run.log_every >= 1, "log_every", "must be >= 1"
    yield run.checkpoint_every >= 0, "checkpoint_every", "must be >= 0 (0: at epoch ends only)"
    yield run.checkpoint_minutes >= 0, "checkpoint_minutes", "must be >= 0 (0: not by time)"
    yield run.time_limit >= 0, "time_limit", "minutes, 0 for none"
    tags = all(1 <= len(tag) <= LONGEST_TAG for tag in run.wandb_tags)
    yield tags, "wandb_tags", f"tags of 1 to {LONGEST_TAG} characters"
    yield run.stall_timeout == 0 or run.stall_timeout >= 1, "stall_timeout", "seconds, at least 1; 0 for never"
    yield run.keep_checkpoints >= 1, "keep_checkpoints", "must be >= 1"
