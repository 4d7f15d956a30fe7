"""What a training run will be on a cluster, before it costs anything: steps, shares of the ranks, memory, time.

Takes the flags of train. No GPU is needed: memory is counted from shapes, the time from a few steps on this machine
(--probe) or from a speed that you know (--images-per-second).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distcnn.config import TrainConfig, load_toml, take_config
from distcnn.errors import EXIT_FAILED, UserError
from distcnn.files import binary_size
from distcnn.flags import parse as parse_flags

if TYPE_CHECKING:
    from distcnn.build import Dataset
    from distcnn.plan import Cluster, Problem

WIDTH, HEIGHT = 64, 8  # of the learning-rate curve, in characters


@dataclass(frozen=True)
class Options:
    """The cluster, and the flags of train."""

    nodes: int = 1
    """Nodes"""
    gpus_per_node: int = 0
    """GPUs a node; a process each. 0: on the CPU"""
    ranks_per_node: int = 0
    """Processes a node. 0: one a GPU, or one"""
    cpus_per_rank: int = 0
    """CPU cores a process. 0: not known"""
    gpu_memory: float = 0.0
    """GiB of a GPU. 0: not known"""
    time: str = ""
    """Time limit of one start, as SLURM writes it"""
    images_per_second: float = 0.0
    """What one process trains, if you know it"""
    probe: bool = False
    """Measure that with a few steps on this machine (its GPU, if it has one)"""
    curve: Path | None = None
    """Draw the learning rate to this PNG"""
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "ranks_per_node", "cpus_per_rank", "gpu_memory", "images_per_second"):
            if getattr(self, name) < (name == "nodes"):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {int(name == 'nodes')}")


def parse(argv: Sequence[str]) -> Options:
    """The options of the flags, over --config FILE.toml."""
    rest, file = take_config(list(argv))
    base = Options(config=load_toml(file) if file else TrainConfig())
    options: Options = parse_flags(Options, rest, "distcnn plan", __doc__, default=base)
    return options


def run(options: Options) -> int:
    """Print the plan; 0, or 1 if the run could not begin."""
    from distcnn import plan
    from distcnn.build import open_dataset
    from distcnn.submit import seconds_of
    from distcnn.world import World

    config = options.config
    dataset = open_dataset(config, World())
    cluster = plan.Cluster(
        nodes=options.nodes,
        ranks=options.ranks_per_node or options.gpus_per_node or 1,
        gpus=options.gpus_per_node,
        cores=options.cpus_per_rank,
        gpu_bytes=int(options.gpu_memory * plan.GIB),
        time_limit_seconds=seconds_of(options.time) if options.time else 0.0,
    )
    found = plan.problems(config, dataset, cluster)
    if not any(problem.fatal for problem in found):
        _shares(config, dataset, cluster)
        found += _memory(config, dataset, cluster)
        found += _time(options, dataset, cluster)
        _curve(options, dataset)
    for problem in found:
        print(f"{'cannot run' if problem.fatal else 'warning'}: {problem.text}")
    return EXIT_FAILED if any(problem.fatal for problem in found) else 0


def _shares(config: TrainConfig, dataset: Dataset, cluster: Cluster) -> None:
    from distcnn import plan

    part = plan.shares(config, dataset, cluster)
    split = dataset.manifest.split(config.data.train_split)
    geometry = config.geometry
    total = part.steps * config.optim.epochs
    shards = f"{len(split.shards)} shard{'s' * (len(split.shards) > 1)}"
    print(f"data       {split.samples:,} images of {len(dataset.classes)} classes in {shards}")
    if part.samples != split.samples:
        print(f"epoch      {part.samples:,} images: --balance {config.optim.balance} repeats those of rare classes")
    print(f"run        {part.steps:,} steps an epoch, {total:,} in {config.optim.epochs} epochs")
    print(f"step       {geometry.global_batch} images = {geometry.lanes} lanes x tiles of {geometry.tile}")
    print(
        f"processes  {cluster.size} = {cluster.nodes} nodes x {cluster.ranks}, {_span(part.lanes)} lanes each", end=""
    )
    print(f", idle {part.idle:.0%}" if part.idle else "")
    last = f"{sum(part.last_step)} images, {_span(part.last_step)} a process"
    print(f"last step  {last} (a full one: {geometry.global_batch})")
    print(f"shards     {_span(part.shards)} a process in an epoch; a node reads {_span(part.node_bytes, binary_size)}")


def _memory(config: TrainConfig, dataset: Dataset, cluster: Cluster) -> list[Problem]:
    from distcnn import plan

    need = plan.memory(config, dataset, max(plan.shares(config, dataset, cluster).lanes))
    parts = ("parameters", "gradients", "optimizer", "averaged", "teacher", "activations")
    listed = ", ".join(f"{name} {binary_size(getattr(need, name))}" for name in parts if getattr(need, name))
    print(f"memory     about {binary_size(need.total)} a process: {listed}")
    if cluster.gpu_bytes and need.total > 0.9 * cluster.gpu_bytes:
        text = f"{binary_size(need.total)} a process on a GPU of {binary_size(cluster.gpu_bytes)}: lower --tile-size"
        return [plan.Problem(f"{text} and --global-batch-size in proportion")]
    return []


def _time(options: Options, dataset: Dataset, cluster: Cluster) -> list[Problem]:
    from distcnn import plan
    from distcnn.console import duration

    config = options.config
    speed, source = options.images_per_second, "as given"
    if not speed and options.probe:
        from distcnn.probe import images_per_second

        speed, source = images_per_second(config, dataset), "measured here"
    if not speed:
        print("time       not known: --probe, or --images-per-second of one process")
        return []
    seconds = plan.train_seconds(config, dataset, cluster, speed)
    epoch = seconds / config.optim.epochs
    print(
        f"time       {duration(seconds)}, {duration(epoch)} an epoch, if a process makes {_rate(speed)} images/s",
        end="",
    )
    print(f" ({source}); evaluation and communication come on top")
    problems = []
    limit = cluster.time_limit_seconds
    if limit and seconds > limit:
        print(f"           {-(-seconds // limit):.0f} starts of {options.time}: the job is queued again by itself")
    often = config.run.checkpoint_every or config.run.checkpoint_minutes
    if epoch > 1800 and not often:
        text = f"an epoch takes {duration(epoch)}, and so much is lost with a node: --checkpoint-minutes 15"
        problems.append(plan.Problem(text))
    return problems


def _curve(options: Options, dataset: Dataset) -> None:
    from distcnn import plan
    from distcnn.build import order_of

    config = options.config
    steps = order_of(config, dataset).steps
    points = plan.learning_rates(config, steps, WIDTH)
    peak = max(rate for _, rate in points) or 1.0
    print(f"learning rate: {config.optim.schedule}, peak {config.optim.lr:g}, warm-up {config.optim.warmup_epochs:g}")
    for row in range(HEIGHT, 0, -1):
        line = "".join("█" if rate / peak * HEIGHT >= row - 0.5 else " " for _, rate in points)
        print(f"  {peak * row / HEIGHT:>9.2e} |{line.rstrip()}")
    print(f"            +{'-' * len(points)}  steps 1 to {points[-1][0] + 1:,}")
    if options.curve:
        from distcnn.probe import draw_curve

        draw_curve(plan.learning_rates(config, steps, 1000), options.curve)
        print(f"drawn: {options.curve}")


def _span(values: list[int], text: object = None) -> str:
    show = text if callable(text) else (lambda value: f"{value:,}")
    low, high = min(values), max(values)
    return str(show(low)) if low == high else f"{show(low)} to {show(high)}"


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
