"""Check a training run and hand it to SLURM: distcnn submit --nodes 2 --gpus-per-node 8 --time 4:00:00 -- TRAIN FLAGS

What stands behind -- are the flags of distcnn train. They are checked here, before the queue. The job saves itself
before its time is over and is queued again until the run is complete; a node that fails costs the steps since the last
checkpoint. ./site.toml (or --site) says what is particular to the cluster; launch/site.example.toml explains it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distcnn.config import DataConfig, TrainConfig, flatten, load_toml, parse_train
from distcnn.errors import UserError
from distcnn.files import write_atomically
from distcnn.site import load_site
from distcnn.slurm import sbatch
from distcnn.submit import Job, launch_folder, refuse_new_beginning, render, render_prepare, runs


@dataclass(frozen=True)
class Flags:
    """What a job asks SLURM for."""

    nodes: int = 1
    """Nodes"""
    gpus_per_node: int = 0
    """GPUs a node; a process each. 0: a CPU job"""
    ranks_per_node: int = 0
    """Processes a node. 0: one a GPU, or one"""
    cpus_per_rank: int = 0
    """CPU cores a process. 0: cpus_per_gpu of site.toml; without GPUs, 1"""
    time: str = "1:00:00"
    """Time limit of one start, as SLURM writes it: the run goes on in the next start"""
    array: tuple[str, ...] = ()
    """A job array over flags: seed=0..4, lr=0.001,0.01; several make every combination"""
    at_once: int = 0
    """Runs of the array at the same time. 0: all"""
    name: str = ""
    """Job name. Empty: the run folder's"""
    launcher: Literal["torchrun", "accelerate"] = "torchrun"
    """What starts the processes of a node"""
    max_restarts: int = 3
    """Restarts within the job after a process has crashed"""
    warn_seconds: int = 180
    """Seconds before the time limit at which the run is asked to save. SLURM may ask up to 60 s early"""
    site: Path | None = None
    """What is particular to the cluster (default: ./site.toml if there is one)"""
    after: str = ""
    """Job id that must have succeeded before"""
    prepare: str = ""
    """A data set to be made first, on one CPU node: words of distcnn prepare, like 'folder photos --output data/x'"""
    prepare_cpus: int = 8
    """CPU cores of that"""
    prepare_time: str = "4:00:00"
    """Its time limit"""
    dry_run: bool = False
    """Print what would be submitted"""
    where: bool = False
    """Check the flags behind --, print the run folder and stop; for job scripts"""


@dataclass(frozen=True)
class Options:
    """Flags for the job, and the flags of distcnn train."""

    flags: Flags
    train: tuple[str, ...]


def parse(argv: Sequence[str]) -> Options:
    """What stands before the first -- is for the job, the rest for training."""
    from distcnn import flags

    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own = flags.parse(Flags, words[:cut], "distcnn submit", __doc__)
    return Options(own, tuple(words[cut + 1 :]))


def run(options: Options) -> int:
    """Check, then print or submit; 0 if the job is queued."""
    flags = options.flags
    config = parse_train(options.train)
    refuse_new_beginning(config)
    if flags.where:
        print(config.output.absolute())
        return 0
    job, preparation = build(flags, options.train, config)
    check(flags, options.train, job, bool(preparation))
    if flags.dry_run:
        print("\n".join(text for text in (preparation, render(job)) if text), end="")
        return 0
    return _submit(flags, job, preparation)


def build(flags: Flags, train: tuple[str, ...], config: TrainConfig) -> tuple[Job, str]:
    """(the training job, the text of the job that prepares its data or ""). Raises UserError for what cannot be."""
    site = load_site(flags.site)
    ranks = flags.ranks_per_node or flags.gpus_per_node or 1
    base, tasks = runs(flags.array, train, config)
    many = len(tasks) > 1
    logs = base.with_name(f"{base.name}-slurm") if flags.array else base / "logs"
    job = Job(
        name=flags.name or base.name,
        tasks=tasks,
        flags=train,
        nodes=flags.nodes,
        gpus=flags.gpus_per_node,
        ranks=ranks,
        cpus=(flags.cpus_per_rank or (site.cpus_per_gpu if flags.gpus_per_node else 1)) * ranks,
        time=flags.time,
        log=logs / f"slurm-{'%A_%a' if many else '%j'}.out",
        folder=Path.cwd(),
        launch=launch_folder(),
        python=site.python or sys.executable,
        site=site,
        launcher=flags.launcher,
        warn_seconds=flags.warn_seconds,
        max_restarts=flags.max_restarts,
        at_once=flags.at_once,
    )
    words = prepare_words(flags.prepare)
    if not words:
        return job, ""
    log = logs / "prepare-%j.out"
    return job, render_prepare(f"prepare-{base.name}", words, flags.prepare_cpus, flags.prepare_time, log, job)


def check(flags: Flags, train: tuple[str, ...], job: Job, prepared_first: bool) -> None:
    """What would fail or hurt on the nodes, found here. Warnings go to stderr; raises UserError for what would fail."""
    from distcnn import plan
    from distcnn.build import open_dataset
    from distcnn.data.manifest import MANIFEST_NAME
    from distcnn.runfolder import CONFIG, check_same_run
    from distcnn.world import World

    configs = [parse_train([*train, *task.flags]) for task in job.tasks]
    for config in configs:
        saved = config.output / CONFIG
        if saved.exists():
            check_same_run(config, flatten(load_toml(saved)), str(config.output))
    config = configs[0]
    there = (config.data.data / MANIFEST_NAME).exists()
    if prepared_first or (config.data.data == DataConfig().data and not there):  # the digits are made by the job
        return
    dataset = open_dataset(config, World())
    cluster = plan.Cluster(job.nodes, job.ranks, job.gpus, job.cpus // job.ranks)
    found = plan.problems(config, dataset, cluster)
    plan.memory(config, dataset, 1)  # the model can be built, and takes images of this size
    for problem in found:
        if problem.fatal:
            raise UserError(problem.text)
        print(f"warning: {problem.text}", file=sys.stderr)


def prepare_words(text: str) -> list[str]:
    """The words of --prepare, checked as `distcnn prepare` would. Raises UserError."""
    from distcnn import flags
    from distcnn.commands import prepare

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--prepare {text!r}: {error}") from error
    if words:
        flags.parse(prepare.Options, words, "distcnn submit --prepare", None)
    return words


def _submit(flags: Flags, job: Job, preparation: str) -> int:
    """Write the scripts beside the log and hand them to sbatch."""
    logs = job.log.parent
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{logs} cannot be written: {error.strerror or error}") from error
    after = [flags.after] if flags.after else []
    if preparation:
        script = logs / "prepare.sbatch"
        write_atomically(script, preparation.encode())
        first = sbatch(script, after)
        after = [first]
        print(f"submitted job {first}: distcnn prepare {flags.prepare}")
    script = logs / "train.sbatch"
    write_atomically(script, render(job).encode())
    number = sbatch(script, after)
    print(f"submitted job {number}: {f'{len(job.tasks)} runs' if job.is_array else job.tasks[0].run}")
    print(f"  output    {str(job.log).replace('%A', number).replace('%j', number)}")
    print(f"  status    distcnn status {shlex.quote(str(job.tasks[0].run))}")
    print(f"  pause     scancel --batch --signal=USR1 {number}    (saves, is queued again)")
    print(f"  stop      scancel {number}    (saves, ends)")
    return 0
