"""What a training run is: frozen dataclasses, TOML files, flags. All is validated here, before torch is imported.

The dataclasses are grouped for `--help`; names are unique over all groups, so flags and TOML keys are flat. The
defaults are the digits recipe: `train.py` without arguments runs it.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distcnn.data.order import Geometry
from distcnn.demands import augmentation_of, demands
from distcnn.errors import UserError, nearest

TestTimeViews = Literal["none", "flip", "flip-shift"]  # see tta.py


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
    progressive: tuple[int, ...] = ()
    """Train at these sides in pixels, each for an equal share of the epochs, such as 64 96; evaluate at
    --image-size, which is better somewhat larger (Touvron et al. 2019). Small images first are faster."""
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
    decode: Literal["cpu", "nvjpeg"] = "cpu"
    """nvjpeg: decode, cut and scale training images on the GPU; their pixels differ a little, so it is another run."""
    loader: Literal["exact", "stream"] = "exact"
    """exact: each sample once, in an order that resumes. stream: shards that cannot be indexed, drawn by webdataset
    with replacement; nothing is promised of what comes."""
    stream_samples: int = 0
    """stream: samples to call an epoch. 0: as many as the split has."""
    allow_pipe: bool = False
    """stream: allow pipe:COMMAND, which runs in a shell."""
    decode_threads: int = 0
    """Threads that read and decode, per process. 0: the process's share of the cores."""
    decode_processes: int = 0
    """Read and decode training images in so many processes (per rank) instead, on Linux, from local shards: faster for
    images of 32 px where libturbojpeg is not installed (distcnn doctor)."""
    window_shards: int = 0
    """Shards of a lane that are shuffled together. 0: 16, or as many as hold 65,536 samples.
    More mix sets sorted by class better; fewer keep less of a remote set at hand."""


def augmentations(data: DataConfig) -> dict[str, float]:
    """The words of --augment: value by name, 1 for trivial-augment. Checked when the config was made."""
    return dict(pair for pair in map(augmentation_of, data.augment) if pair)


@dataclass(frozen=True)
class ModelConfig:
    """The network. Sizes of `cnn` are set here; torchvision's classification models go by name."""

    model: str = "cnn"
    """cnn; resnet9 or airbench, fast ones for small images; a torchvision model such as resnet18; timm:NAME."""
    pretrained: str = ""
    """Begin with the weights of a run folder, checkpoint, .safetensors or .pth file; with other classes, a new head."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: with --pretrained, train the last layer only."""
    channels: tuple[int, ...] = (32, 64)
    """cnn: output channels of each convolution block; each is followed by pooling. resnet9 takes four numbers,
    airbench three (by default 64 128 256 512, and 64 256 256)."""
    kernel_size: int = 3
    """cnn: side of the convolution kernels (odd)."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """cnn, resnet9: activation function."""
    norm: Literal["batch", "none"] = "batch"
    """cnn: batch norm after each convolution, or none."""
    pooling: Literal["max", "avg", "stride"] = "max"
    """cnn: how a block halves the side: max pooling, average pooling or a stride of 2."""
    hidden: int = 128
    """cnn: units of the hidden linear layer. 0: none."""
    dropout: float = 0.0
    """cnn, resnet9: dropout before the last layer."""
    blur_pool: bool = False
    """Blur before every convolution with a stride, for invariance to shifts."""
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
    optimizer: Literal["sgd", "adamw", "lamb", "muon"] = "adamw"
    """sgd (Nesterov momentum); adamw; lamb, for large batches; muon: orthogonal steps for convolutions, adamw for the
    rest, at adamw's rates."""
    lr: float = 3e-3
    """Peak learning rate."""
    layer_decay: float = 1.0
    """Fine-tuning: the learning rate of each block is this times that of the block behind it."""
    momentum: float = 0.9
    """Momentum of sgd and muon."""
    weight_decay: float = 0.01
    """Weight decay; not applied to biases and norms."""
    warmup_epochs: float = 1.0
    """Warm-up in epochs: linear from 0; of one-cycle the whole rise, in a cosine from 1/25."""
    schedule: Literal["cosine", "linear", "constant", "step", "one-cycle"] = "cosine"
    """How the learning rate falls after the warm-up: to 0; not at all; step: to a tenth after each third of the run;
    one-cycle: in a cosine to 1/250,000."""
    loss: Literal["ce", "bce"] = "ce"
    """Cross entropy; bce: binary cross entropy of each class, in which both labels of a mixed image count as true."""
    balance: Literal["none", "sqrt", "inverse", "sample", "sample-sqrt"] = "none"
    """For classes of unequal size. inverse, sqrt: a class counts in the loss one over the number of its images, or over
    its root. sample: images of rare classes are repeated until all classes come equally often; sample-sqrt: half of
    that way (on a logarithmic scale). plan says how long such an epoch is."""
    distill: str = ""
    """Learn from a teacher besides: a run folder or checkpoint of distcnn with the same classes and image size. It sees
    the same augmented images, which pays in long runs (Beyer et al. 2021)."""
    distill_weight: float = 0.5
    """Share of the teacher in the loss, the rest is the labels': (1 - w) CE + w T^2 KL. 1: the teacher alone."""
    distill_temperature: float = 2.0
    """T: both networks' logits are divided by it. The higher, the more the teacher's small probabilities count."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    mixup: float = 0.0
    """Alpha of MixUp's Beta distribution; partners lie in the same tile. 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; with both on, each tile draws one. 0: off."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights, which are then the ones evaluated. 0: off."""
    lookahead: int = 0
    """Average the weights as they are trained: every so many steps they are set back to slow ones, which have moved
    towards them by 1 - 0.95^N (t/T)^3, so nearly all the way at first. 5 is usual. 0: off."""
    clip_grad_norm: float = 0.0
    """Largest gradient norm. 0: not clipped."""
    patience: int = 0
    """End the run after so many evaluations without a better top-1. 0: never."""
    tta: TestTimeViews = "none"
    """Evaluate the mean over views: flip: each image and its mirror image; flip-shift: also shifted, 6 views in all."""


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
    wandb_tags: tuple[str, ...] = ()
    """W&B tags of the run, such as baseline 8-gpus. Empty: those of WANDB_TAGS."""
    wandb_group: str = ""
    """W&B group of runs, such as the seeds of one setting. Empty: WANDB_RUN_GROUP."""
    wandb_notes: str = ""
    """What the run is about, for its W&B page. Empty: WANDB_NOTES."""
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
        for ok, flag, demand in demands(self, flatten(self)):
            if not ok:
                raise UserError(f"--{flag.replace('_', '-')} {_flat_text(self, flag)}: {demand}")

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.optim.global_batch_size, self.optim.tile_size)

    @property
    def output(self) -> Path:
        """The run folder."""
        model = self.model.model.replace(":", "-").replace("/", "-")
        name = f"{self.data.data.resolve().name}-{model}-seed{self.run.seed}"
        return Path(self.run.output) if self.run.output else Path("runs") / name


# What may differ between a run and its resumption: none of it changes the trajectory (threads change the last bits).
FREE_ON_RESUME = frozenset(
    {
        "output",
        "resume",
        "device",
        "compile",
        "threads",
        "decode_threads",
        "decode_processes",
        "cache",
        "data",
        "val_split",
        "quiet",
    }
    | {"checkpoint_minutes", "time_limit", "stall_timeout", "patience", "tta"}
    | {"distill"}  # the weights of the teacher are compared, wherever they lie (distill.py)
    | {"eval_every", "log_every", "checkpoint_every", "keep_checkpoints", "wandb_mode", "wandb_project", "wandb_name"}
    | {"wandb_tags", "wandb_group", "wandb_notes"}
)


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
