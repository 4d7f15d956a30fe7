"""What a run will be on a cluster, before a GPU hour is spent: a pure function of config, manifest and cluster.

Nothing here needs a GPU. Memory is counted on torch's meta device, where tensors have shapes but no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distcnn.build import Dataset, order_of
from distcnn.config import TrainConfig
from distcnn.data.order import automatic_window
from distcnn.distill import weights_of
from distcnn.optim import build_schedule, state_values
from distcnn.shapes import activation_bytes, meta_model

SMALL_GPU_TILE = 32
DECODE_PIXELS_PER_SECOND = 120e6  # one core, JPEG of 500x375 px; see benchmarks/
GIB = 1 << 30


@dataclass(frozen=True)
class Cluster:
    """What the run gets. `cores` and `gpu_bytes`: of a process; 0: not known."""

    nodes: int = 1
    ranks: int = 1  # processes a node
    gpus: int = 0  # a node
    cores: int = 0
    gpu_bytes: int = 0
    time_limit_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks < 1 or min(self.gpus, self.cores, self.gpu_bytes) < 0:
            raise ValueError(f"no such cluster: {self}")

    @property
    def size(self) -> int:
        """All processes."""
        return self.nodes * self.ranks


@dataclass(frozen=True)
class Problem:
    """What will hurt. `fatal`: the run would not even begin."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Shares:
    """What each rank of the first epoch gets, by rank: (R,) lists."""

    steps: int
    samples: int  # of the epoch
    lanes: list[int]
    shards: list[int]
    last_step: list[int]  # samples of the ragged last step
    node_bytes: list[int]  # of the shards that each node reads

    @property
    def idle(self) -> float:
        """Share of the ranks' time that they wait for the one with most lanes."""
        return 1 - sum(self.lanes) / (max(self.lanes) * len(self.lanes))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its device, at the end of a forward pass, when it is highest."""

    parameters: int
    gradients: int  # with the sums that the tree keeps
    optimizer: int
    averaged: int  # --ema-decay, --lookahead
    teacher: int  # --distill
    activations: int  # kept for the backward pass of one tile

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.averaged + self.teacher + self.activations


def shares(config: TrainConfig, dataset: Dataset, cluster: Cluster) -> Shares:
    """Lanes, shards and samples by rank in epoch 0. Raises ValueError for more ranks than lanes."""
    order = order_of(config, dataset)
    split = dataset.manifest.split(config.data.train_split)
    mine = [config.geometry.lanes_of(rank, cluster.size) for rank in range(cluster.size)]
    read = [np.unique(np.concatenate([order.lane_shards(lane) for lane in lanes])) for lanes in mine]
    tiles = order.tile_sizes(order.steps - 1) if order.steps else [0] * config.geometry.lanes
    size = np.array([shard.bytes for shard in split.shards], dtype=np.int64)
    nodes = [np.unique(np.concatenate(read[n * cluster.ranks : (n + 1) * cluster.ranks])) for n in range(cluster.nodes)]
    return Shares(
        steps=order.steps,
        samples=order.samples,
        lanes=[len(lanes) for lanes in mine],
        shards=[len(shards) for shards in read],
        last_step=[sum(tiles[lane] for lane in lanes) for lanes in mine],
        node_bytes=[int(size[shards].sum()) for shards in nodes],
    )


def memory(config: TrainConfig, dataset: Dataset, lanes: int) -> Memory:
    """Bytes of a process with `lanes` lanes, counted from a forward pass on the meta device. No allocator's slack.

    Raises UserError for a model that cannot be built or cannot take the images.
    """
    model = meta_model(config.model, len(dataset.classes), dataset.size)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    every = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    waiting = lanes.bit_length() - 1 if config.run.reduction == "tree" else 0  # sums on the binary counter
    return Memory(
        parameters=every,
        gradients=trained * (1 + waiting),
        optimizer=4 * state_values(config.optim, model),
        averaged=every * (bool(config.optim.ema_decay) + bool(config.optim.lookahead)),
        teacher=_teacher_bytes(config.optim.distill),
        activations=activation_bytes(model, config.optim.tile_size, dataset.size, config.run.mixed_precision != "no"),
    )


def _teacher_bytes(given: str) -> int:
    """Of the weights that --distill names, 0 without it. What the teacher computes is not kept."""
    if not given:
        return 0
    folder, file = weights_of(given)
    return (folder / file).stat().st_size


def learning_rates(config: TrainConfig, steps: int, points: int) -> list[tuple[int, float]]:
    """(step, learning rate) at so many places over the whole run, the first and the last step among them."""
    schedule = build_schedule(config.optim, steps)
    last = max(config.optim.epochs * steps - 1, 0)
    places = sorted({round(last * place / max(points - 1, 1)) for place in range(points)})
    return [(step, schedule(step)) for step in places]


def train_seconds(config: TrainConfig, dataset: Dataset, cluster: Cluster, images_per_second: float) -> float:
    """Seconds of training if one process makes so many images a second, without evaluations and communication."""
    part = shares(config, dataset, cluster)
    tiles = max(part.lanes) * part.steps * config.optim.epochs
    return tiles * config.optim.tile_size / images_per_second


def problems(config: TrainConfig, dataset: Dataset, cluster: Cluster) -> list[Problem]:
    """What will hurt, the fatal first."""
    try:
        part = shares(config, dataset, cluster)
    except ValueError as error:
        return [Problem(str(error), fatal=True)]
    return [*_of_ranks(config, cluster, part), *_of_data(config, dataset, cluster, part)]


def _of_ranks(config: TrainConfig, cluster: Cluster, part: Shares) -> Iterator[Problem]:
    lanes, size = config.geometry.lanes, cluster.size
    most = max(part.lanes)
    if lanes % size:
        better = max(r for r in range(1, size + 1) if lanes % r == 0)
        yield Problem(
            f"{lanes} lanes on {size} processes: some compute {most} tiles a step, others {min(part.lanes)}, so"
            f" {part.idle:.0%} of the processes' time is idle and sums differ in the last bits; {better} processes, or"
            f" a --global-batch-size that is a multiple of {size * config.optim.tile_size}, would not"
        )
    elif size > 1 and config.run.reduction == "tree" and (lanes // size) & (lanes // size - 1):
        yield Problem(
            f"{lanes // size} lanes a process are no power of two: sums differ in the last bits from those of other"
            " numbers of processes"
        )
    if config.run.reduction == "tree" and size & (size - 1):
        yield Problem(f"{size} processes are no power of two: the tree reduction takes the slower way, in chunks")
    if cluster.gpus and config.run.device == "cpu":
        yield Problem("--device cpu: the GPUs that the job asks for would do nothing")
    if cluster.gpus and cluster.ranks != cluster.gpus:
        yield Problem(f"{cluster.ranks} processes a node on {cluster.gpus} GPUs: one each is what works")
    if cluster.gpus and config.optim.tile_size < SMALL_GPU_TILE:
        yield Problem(
            f"tiles of {config.optim.tile_size} images leave a GPU idle most of the time: raise --tile-size (with"
            " --global-batch-size, so that the lanes stay as many as the processes)"
        )


def _of_data(config: TrainConfig, dataset: Dataset, cluster: Cluster, part: Shares) -> Iterator[Problem]:
    split = dataset.manifest.split(config.data.train_split)
    lanes = config.geometry.lanes
    if part.steps < 5:
        yield Problem(
            f"{part.samples:,} images are {part.steps} step{'s' * (part.steps != 1)} an epoch of"
            f" {config.optim.global_batch_size}: a smaller --global-batch-size learns more from each image"
        )
    starved = sum(samples == 0 for samples in part.last_step)
    if starved:
        yield Problem(f"{starved} of {cluster.size} processes have no image in the last step of an epoch: they wait")
    remote = any("://" in shard.name for shard in split.shards)
    if remote and len(split.shards) < lanes:
        yield Problem(
            f"{len(split.shards)} shards for {lanes} lanes: several processes read, and fetch, the same shard; smaller"
            " shards (distcnn prepare --shard-samples) would not"
        )
    window = config.data.window_shards or automatic_window(np.array([shard.samples for shard in split.shards]))
    if len(split.shards) > 8 * lanes * window:
        yield Problem(
            f"{len(split.shards)} shards, {window} shuffled together in each of {lanes} lanes:"
            " images of distant shards of a lane never meet within an epoch (--window-shards)"
        )
    counts = [count for count in split.class_counts if count]
    if len(counts) < len(split.class_counts):
        yield Problem(f"{len(split.class_counts) - len(counts)} classes have no training image")
    elif config.optim.balance == "none" and max(counts) > 20 * min(counts):
        spread = f"{min(counts):,} to {max(counts):,}"
        yield Problem(f"classes have {spread} training images: rare ones will suffer (see --balance)")
    epoch = part.samples / DECODE_PIXELS_PER_SECOND * _pixels(dataset)
    if cluster.cores and cluster.gpus and epoch / (cluster.cores * cluster.size) > 120:
        yield Problem(
            f"decoding an epoch takes about {epoch / (cluster.cores * cluster.size) / 60:.0f} min on {cluster.cores}"
            f" cores for each of {cluster.size} processes: more cores, or distcnn prepare --max-side"
        )


def _pixels(dataset: Dataset) -> float:
    """Pixels of a typical image, 0 where sizes are not known."""
    image = dataset.manifest.image
    return math.sqrt(image.min_width * image.max_width * image.min_height * image.max_height)
