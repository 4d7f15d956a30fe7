"""What a training run is: frozen dataclasses, TOML files, flags. All is validated here, before torch is imported.

The dataclasses are grouped for `--help`; names are unique over all groups, so flags and TOML keys are flat. The
defaults are the digits recipe: `train.py` without arguments runs it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distcnn.data.order import Geometry
from distcnn.errors import UserError, nearest


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how images become model inputs."""

    data: Path = Path("data/digits")
    """Folder of a data set (with dataset.json). The default, the digits, is made when it is missing."""
    train_split: str = "train"
    """Split to train on. With --loader stream also shards: a pattern, or pipe:COMMAND."""
    val_split: str = "val"
    """Split to evaluate on."""
    image_size: int = 0
    """Side of the square model input in pixels. 0: the images' own size where all have the same, else 224."""
    crop: Literal["auto", "none", "pad", "translate", "random-resized"] = "auto"
    """Training crop. pad: shifted over a black border; translate: over a mirrored one.
    auto: pad where all images have the input size already, else random-resized."""
    crop_padding: int = -1
    """Pixels that --crop pad and translate shift by. -1: an eighth of the side."""
    crop_scale: float = 0.35
    """Smallest share of the area that --crop random-resized keeps."""
    flip: Literal["auto", "none", "random", "alternate"] = "auto"
    """Mirror images left-right. alternate: every other epoch, from a random start for each image.
    auto: random, but none for grayscale sets, which are mostly characters."""
    augment: tuple[str, ...] = ()
    """More training augmentation, any of: trivial-augment color-jitter=0.4 erasing=0.25 cutout=8"""
    cache: Literal["auto", "off", "host"] = "auto"
    """Keep decoded images in memory. auto: host where the whole split takes less than 1 GiB."""
    loader: Literal["exact", "stream"] = "exact"
    """exact: each sample once, in an order that resumes. stream: shards that cannot be indexed, drawn by webdataset
    with replacement; nothing is promised of what comes."""
    stream_samples: int = 0
    """stream: samples to call an epoch. 0: as many as the split has."""
    allow_pipe: bool = False
    """stream: allow pipe:COMMAND, which runs in a shell."""
    decode_threads: int = 0
    """Threads that read and decode, per process. 0: the process's share of the cores."""
    window_shards: int = 0
    """Shards of a lane that are shuffled together. 0: 16, or as many as hold 65,536 samples.
    More mix sets sorted by class better; fewer keep less of a remote set at hand."""


AUGMENTATIONS = "trivial-augment, color-jitter=0..1, erasing=0..1 (probability), cutout=1..1024 (pixels)"
_LARGEST = {"color-jitter": 1.0, "erasing": 1.0, "cutout": 1024.0}


def _augmentation(word: str) -> tuple[str, float] | None:
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


def augmentations(data: DataConfig) -> dict[str, float]:
    """The words of --augment: value by name, 1 for trivial-augment. Checked when the config was made."""
    return dict(pair for pair in map(_augmentation, data.augment) if pair)


@dataclass(frozen=True)
class ModelConfig:
    """The network. Sizes of `cnn` are set here; torchvision's classification models go by name."""

    model: str = "cnn"
    """cnn, or a torchvision classification model such as resnet18."""
    channels: tuple[int, ...] = (32, 64)
    """cnn: output channels of each convolution block; each is followed by pooling."""
    kernel_size: int = 3
    """cnn: side of the convolution kernels (odd)."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """cnn: activation function."""
    norm: Literal["batch", "none"] = "batch"
    """cnn: batch norm after each convolution, or none."""
    pooling: Literal["max", "avg", "stride"] = "max"
    """cnn: how a block halves the side: max pooling, average pooling or a stride of 2."""
    hidden: int = 128
    """cnn: units of the hidden linear layer. 0: none."""
    dropout: float = 0.0
    """cnn: dropout before the last layer."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """torchvision ResNets: 7x7 stride 2 + pooling, or 3x3 stride 1. auto: small below 64 px."""
    batch_norm: Literal["tile", "sync", "frozen"] = "tile"
    """Statistics of each tile (the same at any number of processes); sync: of the tiles that all processes compute
    at the same time (depends on their number); frozen: the running ones."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimisation: all of it is independent of the number of processes."""

    epochs: int = 20
    """Passes over the training split."""
    global_batch_size: int = 64
    """Samples in a step, over all processes (B)."""
    tile_size: int = 8
    """Samples that one forward pass sees (m). B / m is the largest number of processes."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd (Nesterov momentum) or adamw."""
    lr: float = 3e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 0.01
    """Weight decay; not applied to biases and norms."""
    warmup_epochs: float = 1.0
    """Linear warm-up from 0, in epochs."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up (to 0, or stays)."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    mixup: float = 0.0
    """Alpha of MixUp's Beta distribution; partners lie in the same tile. 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; with both on, each tile draws one. 0: off."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights, which are then the ones evaluated. 0: off."""
    clip_grad_norm: float = 0.0
    """Largest gradient norm. 0: not clipped."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how it runs."""

    output: str = ""
    """Run folder. Empty: runs/<data>-<model>-seed<seed>."""
    seed: int = 0
    """Fixes weights, order and augmentation."""
    resume: str = "auto"
    """auto: go on where the run folder stopped; never: begin anew (the old folder is moved aside); or a checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU per process where there are any."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast type of the forward pass."""
    compile: bool = False
    """torch.compile the model (takes a minute at first)."""
    reduction: Literal["tree", "ddp"] = "tree"
    """How gradients are summed. tree: one fixed order, equal to the bit at any number of processes; ddp: all-reduce."""
    threads: int = 0
    """Compute threads per process. 0: the process's share of the cores; 1 where images are tiny."""
    eval_every: int = 1
    """Evaluate every so many epochs (always after the last)."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides those at epoch ends. 0: only at epoch ends."""
    checkpoint_minutes: float = 0.0
    """Minutes between checkpoints, besides. 0: not by time."""
    time_limit: float = 0.0
    """Minutes after which the run saves itself and stops with exit code 75. 0: none."""
    stall_timeout: float = 300.0
    """Seconds without progress on any process after which the run ends and names the one it waits for. 0: never."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, besides the best."""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """Weights & Biases. online without a key goes offline; it never asks."""
    wandb_project: str = "distcnn"
    """W&B project."""
    wandb_name: str = ""
    """W&B run name. Empty: the run folder's name."""
    quiet: bool = False
    """Print warnings and errors only."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything of a training run; checked as a whole when it is made."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for ok, flag, demand in _demands(self):
            if not ok:
                raise UserError(f"--{flag.replace('_', '-')} {_flat_text(self, flag)}: {demand}")

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.optim.global_batch_size, self.optim.tile_size)

    @property
    def output(self) -> Path:
        """The run folder."""
        name = f"{self.data.data.resolve().name}-{self.model.model}-seed{self.run.seed}"
        return Path(self.run.output) if self.run.output else Path("runs") / name


# What may differ between a run and its resumption: none of it changes the trajectory (threads change the last bits).
FREE_ON_RESUME = frozenset(
    {"output", "resume", "device", "compile", "threads", "decode_threads", "cache", "data", "val_split", "quiet"}
    | {"checkpoint_minutes", "time_limit", "stall_timeout"}
    | {"eval_every", "log_every", "checkpoint_every", "keep_checkpoints", "wandb_mode", "wandb_project", "wandb_name"}
)

ALPHAS = (0.01, 4.0)  # beyond them nothing or everything is mixed, and draws from Beta by rejection take very long


def _demands(config: TrainConfig) -> Iterator[tuple[bool, str, str]]:
    """(holds, flag, what is demanded) for every value that has limits."""
    data, model, optim, run = config.data, config.model, config.optim, config.run
    for name, value in flatten(config).items():
        text = value if isinstance(value, str) else ""
        yield text == text.encode("utf-8", "ignore").decode(), name, "must be UTF-8 text"
    batch, tile = optim.global_batch_size, optim.tile_size
    yield data.image_size >= 0, "image_size", "pixels, 0 for the data's own size"
    yield data.crop_padding >= -1, "crop_padding", "pixels, -1 for an eighth of the side"
    yield 0 < data.crop_scale <= 1, "crop_scale", "must be in (0, 1]"
    wrong = next((word for word in data.augment if _augmentation(word) is None), None)
    yield wrong is None, "augment", f"{wrong!r} is none of {AUGMENTATIONS}"
    once = len({word.partition("=")[0] for word in data.augment}) == len(data.augment)
    yield once, "augment", "each of them once"
    exact = data.loader == "exact"
    yield not (exact and data.allow_pipe), "allow_pipe", "--loader stream only"
    yield not (exact and data.stream_samples), "stream_samples", "--loader stream only"
    yield data.stream_samples >= 0, "stream_samples", "must be >= 0 (0: as many as the split has)"
    yield data.decode_threads >= 0, "decode_threads", "must be >= 0 (0: automatic)"
    yield data.window_shards >= 0, "window_shards", "must be >= 0 (0: automatic)"
    yield bool(model.model), "model", "name a model: cnn, resnet18, ..."
    yield len(model.channels) > 0 and min(model.channels) > 0, "channels", "one or more positive numbers"
    yield model.kernel_size >= 1 and model.kernel_size % 2 == 1, "kernel_size", "must be odd and positive"
    yield model.hidden >= 0, "hidden", "must be >= 0"
    yield 0 <= model.dropout < 1, "dropout", "must be in [0, 1)"
    yield optim.epochs >= 1, "epochs", "must be >= 1"
    yield batch >= 1, "global_batch_size", "must be >= 1"
    yield tile >= 1, "tile_size", "must be >= 1"
    below = f", {max(batch // tile, 1) * tile}" if tile >= 1 else ""
    yield batch % max(tile, 1) == 0, "global_batch_size", f"must be a multiple of --tile-size {tile}{below} for example"
    yield 0 < optim.lr < float("inf"), "lr", "must be positive"
    yield 0 <= optim.momentum < 1, "momentum", "must be in [0, 1)"
    yield 0 <= optim.weight_decay < float("inf"), "weight_decay", "must be >= 0"
    yield 0 <= optim.warmup_epochs <= optim.epochs, "warmup_epochs", f"must be between 0 and --epochs {optim.epochs}"
    yield 0 <= optim.label_smoothing < 1, "label_smoothing", "must be in [0, 1)"
    for name, alpha in (("mixup", optim.mixup), ("cutmix", optim.cutmix)):
        yield alpha == 0 or ALPHAS[0] <= alpha <= ALPHAS[1], name, f"0 (off), or {ALPHAS[0]} to {ALPHAS[1]}"
    yield 0 <= optim.ema_decay < 1, "ema_decay", "must be in [0, 1)"
    yield 0 <= optim.clip_grad_norm < float("inf"), "clip_grad_norm", "must be >= 0 (0: not clipped)"
    yield 0 <= run.seed < 2**63, "seed", "must be in [0, 2**63)"
    yield run.threads >= 0, "threads", "must be >= 0 (0: automatic)"
    yield run.eval_every >= 1, "eval_every", "must be >= 1"
    yield run.log_every >= 1, "log_every", "must be >= 1"
    yield run.checkpoint_every >= 0, "checkpoint_every", "must be >= 0 (0: at epoch ends only)"
    yield run.checkpoint_minutes >= 0, "checkpoint_minutes", "must be >= 0 (0: not by time)"
    yield run.time_limit >= 0, "time_limit", "minutes, 0 for none"
    yield run.stall_timeout == 0 or run.stall_timeout >= 1, "stall_timeout", "seconds, at least 1; 0 for never"
    for name, value in flatten(config).items():
        yield not isinstance(value, float) or math.isfinite(value), name, "must be finite"
    yield run.keep_checkpoints >= 1, "keep_checkpoints", "must be >= 1"


def _flat_text(config: TrainConfig, name: str) -> str:
    value = flatten(config)[name]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All values by flat name, as plain JSON and TOML types."""
    values: dict[str, Any] = {}
    for group in dataclasses.fields(config):
        for name, value in vars(getattr(config, group.name)).items():
            values[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return values


def from_flat(values: Mapping[str, Any], where: str = "config", base: TrainConfig | None = None) -> TrainConfig:
    """A TrainConfig of flat names over `base`. Raises UserError naming `where`, the key and the nearest valid one."""
    base = base or TrainConfig()
    groups = {group.name: getattr(base, group.name) for group in dataclasses.fields(base)}
    owner = {name: group for group, part in groups.items() for name in vars(part)}
    changes: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for name, value in values.items():
        if name not in owner:
            raise UserError(f"{where}: no setting {name!r}{nearest(name, owner)}")
        group = owner[name]
        wanted = typing.get_type_hints(type(groups[group]))[name]
        changes[group][name] = _coerce(value, wanted, f"{where}: {name}")
    try:
        return TrainConfig(**{name: dataclasses.replace(part, **changes[name]) for name, part in groups.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _coerce(value: Any, wanted: Any, where: str) -> Any:
    """`value` as a field's type, or a UserError that says what was wanted."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        wanted = next(a for a in arguments if a is not type(None))
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} = {value!r}{nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} = {value!r} must be a list such as [32, 64]")
        return tuple(_coerce(item, arguments[0], where) for item in value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"{where} = {value!r} must be of type {wanted.__name__}")
    return value


def load_toml(path: Path) -> TrainConfig:
    """A config of a TOML file over the defaults. Raises UserError naming the file and, where it can, the line."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    return from_flat(values, str(path))


def to_toml(config: TrainConfig) -> str:
    """The resolved config as a TOML file that `--config` reads back to the same."""
    lines = ["# All settings of this run; train with --config THIS_FILE to repeat it."]
    for group in dataclasses.fields(config):
        lines += ["", f"# {group.name}"]
        part = getattr(config, group.name)
        for name in vars(part):
            value = json.dumps(flatten(config)[name], ensure_ascii=False)  # TOML's own, but for one character
            lines.append(f"{name} = {value}".replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"


def parse_train(argv: Sequence[str], prog: str = "distcnn train") -> TrainConfig:
    """A config of command-line flags over `--config FILE.toml` over the defaults. Raises UserError, one line."""
    from distcnn.flags import parse

    rest, file = take_config(list(argv))
    base = load_toml(file) if file else TrainConfig()
    about = (
        "Train a CNN. Without flags: the handwritten digits that scikit-learn ships, in under a minute.\n\n"
        "--config FILE.toml sets defaults (configs/ has recipes); flags win. The same command again goes on where it\n"
        "stopped. The same run from any number of processes: torchrun --nproc-per-node=N train.py FLAGS."
    )
    config = parse(TrainConfig, rest, prog, about, default=base)
    return typing.cast(TrainConfig, config)


def take_config(argv: list[str]) -> tuple[list[str], Path | None]:
    """(the flags without `--config FILE`, the file or None). Raises UserError where the name is missing."""
    rest: list[str] = []
    file: Path | None = None
    words = iter(argv)
    for word in words:
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise UserError("--config needs the name of a TOML file")
            file = Path(value)
        elif word.startswith("--config="):
            file = Path(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, file
