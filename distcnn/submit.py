"""From a training command to the text of a SLURM job: pure functions, no torch, nothing is run here."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distcnn.config import TrainConfig, parse_train
from distcnn.errors import UserError
from distcnn.site import Site

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
MAX_ARRAY = 1000


@dataclass(frozen=True)
class Task:
    """One training run: its folder and the flags that it has besides those of all."""

    run: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A training job. `tasks`: one run, or those of a job array."""

    name: str
    tasks: tuple[Task, ...]
    flags: tuple[str, ...]  # of `distcnn train`, common to all tasks
    nodes: int
    gpus: int  # a node; 0: none
    ranks: int  # processes a node
    cpus: int  # a node; 0: what the site gives
    time: str
    log: Path  # with SLURM's patterns such as %j in its last part
    folder: Path  # where it was submitted
    launch: Path  # the folder of batch.sh
    python: str
    site: Site
    launcher: str = "torchrun"
    warn_seconds: int = 180
    max_restarts: int = 3
    at_once: int = 0  # tasks of an array that run at the same time; 0: all

    def __post_init__(self) -> None:
        if not self.tasks or len(self.tasks) > MAX_ARRAY:
            raise UserError(f"{len(self.tasks)} runs: 1 to {MAX_ARRAY} in a job array")
        for least, name in ((1, "nodes"), (0, "gpus"), (1, "ranks"), (0, "cpus"), (0, "max_restarts"), (0, "at_once")):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: at least {least}")
        seconds = seconds_of(self.time)
        if not 30 <= self.warn_seconds < seconds:
            raise UserError(
                f"--warn-seconds {self.warn_seconds}: from 30 to less than --time {self.time}: what the last save needs"
            )

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1


def launch_folder() -> Path:
    """Where batch.sh lies: beside the package in a checkout, within it when it was installed."""
    package = Path(__file__).resolve().parent
    for place in (package / "launch", package.parent / "launch"):
        if (place / "batch.sh").exists():
            return place
    raise UserError(f"launch/batch.sh is neither in {package} nor beside it: install distcnn anew")


def refuse_new_beginning(config: TrainConfig) -> None:
    """Raises UserError for --resume never: a job that is queued again would begin anew each time."""
    if config.run.resume == "never":
        raise UserError("--resume never: a requeued job would begin anew each time; give a new --output instead")


def runs(array: Sequence[str], train: Sequence[str], config: TrainConfig) -> tuple[Path, tuple[Task, ...]]:
    """(base, tasks): the run folders of one run, or of every combination of `array`, each checked by itself.

    A single run's base is its folder; the folders of an array are called base-seed0, base-seed1 and so on. Raises
    UserError naming the combination whose flags are wrong.
    """
    if not array:
        run = config.output.absolute()
        return run, (Task(run),)
    base = Path(config.run.output or f"runs/{config.data.data.resolve().name}-{config.model.model}").absolute()
    tasks = []
    for flags, name in sweep(array):
        run = base.with_name(f"{base.name}-{name}")
        task = Task(run, (*flags, "--output", str(run)))
        try:
            refuse_new_beginning(parse_train([*train, *task.flags]))
        except UserError as error:
            raise UserError(f"--array, {name}: {error}") from error
        tasks.append(task)
    return base, tuple(tasks)


def seconds_of(time: str) -> int:
    """A SLURM time limit in seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises UserError."""
    match = _TIME.fullmatch(time)
    if not match:
        raise UserError(f"--time {time!r}: minutes, or hours:minutes:seconds, or days-hours")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def sweep(words: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    """Words such as seed=0..4 and lr=0.1,0.3 as (flags, name) of every combination. Raises UserError."""
    axes = []
    for word in words:
        flag, equals, text = word.lstrip("-").partition("=")
        if not equals or not flag or not text:
            raise UserError(f"--array {word!r}: FLAG=VALUE,VALUE,... or FLAG=FIRST..LAST, for example seed=0..4")
        span = re.fullmatch(r"(\d+)\.\.(\d+)", text)
        values = [str(n) for n in range(int(span[1]), int(span[2]) + 1)] if span else text.split(",")
        if not values or "" in values or len(set(values)) < len(values):
            raise UserError(f"--array {word!r}: every value once, and at least one")
        axes.append([(flag.replace("_", "-"), value) for value in values])
    if len({axis[0][0] for axis in axes}) < len(axes):
        raise UserError("--array names a flag twice")
    combinations = []
    for chosen in itertools.product(*axes):
        flags = tuple(part for flag, value in chosen for part in (f"--{flag}", value))
        name = "-".join(flag + re.sub(r"[^A-Za-z0-9.+-]", "_", value) for flag, value in chosen)
        combinations.append((flags, name))
    return combinations


def render(job: Job) -> str:
    """The text of a job for sbatch."""
    head = [
        ("nodes", job.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", job.cpus),
        ("time", job.time),
        ("signal", f"B:USR1@{job.warn_seconds}"),
        ("open-mode", "append"),
    ]
    at_once = f"%{job.at_once}" if job.at_once else ""
    array = [f"--array=0-{len(job.tasks) - 1}{at_once}"] if job.is_array else []
    gpus = [job.site.gpus.format(n=job.gpus)] if job.gpus else []
    lines = _header(job.name, job.log, job.folder, head, [*array, *gpus, "--requeue"], job.site)
    lines += [
        _assign("python", job.python),
        _assign("launcher", job.launcher),
        _assign("ranks", str(job.ranks)),
        _assign("max_restarts", str(job.max_restarts)),
        _array("container", job.site.container),
        _array("srun_flags", job.site.srun),
        _assign("host_suffix", job.site.host_suffix),
    ]
    if job.is_array:
        lines += ["", "case $SLURM_ARRAY_TASK_ID in"]
        for number, task in enumerate(job.tasks):
            lines += [f"{number})", f"    {_assign('run', str(task.run))}", f"    {_set(job, task)}", "    ;;"]
        lines += ["esac"]
    else:
        lines += ["", _assign("run", str(job.tasks[0].run)), _set(job, job.tasks[0])]
    lines += [f"source {shlex.quote(str(job.launch / 'batch.sh'))}"]
    return "\n".join(lines) + "\n"


def render_prepare(name: str, words: Sequence[str], cpus: int, time: str, log: Path, job: Job) -> str:
    """The text of a job on one CPU node that runs `distcnn prepare` before `job`, on the same site."""
    seconds_of(time)
    head = [("nodes", 1), ("ntasks", 1), ("cpus-per-task", cpus), ("time", time), ("open-mode", "append")]
    lines = _header(name, log, job.folder, head, ["--requeue"], job.site)
    lines += [_assign("python", job.python), _array("container", job.site.container)]
    command = shlex.join(["-m", "distcnn", "prepare", *words])
    return "\n".join([*lines, f'exec "${{container[@]}}" "$python" {command}']) + "\n"


def _header(
    name: str, log: Path, folder: Path, head: Sequence[tuple[str, object]], more: Sequence[str], site: Site
) -> list[str]:
    names = [("job-name", name), *((key, value) for key, value in head if value)]
    own = [("partition", site.partition), ("account", site.account), ("qos", site.qos)]
    own += [("constraint", site.constraint), ("mem", site.memory)]
    names += [(key, value) for key, value in own if value]
    flags = [f"--{key}={_sbatch_quote(str(value))}" for key, value in names]
    # A % in the folder's name is no pattern; one in the log's own name is.
    pattern = str(log.parent).replace("%", "%%") + "/" + log.name
    flags += [*more, *site.sbatch, f"--output={_sbatch_quote(pattern)}", f"--chdir={_sbatch_quote(str(folder))}"]
    # A login shell knows `module`.
    shell = "#!/bin/bash -l" if site.modules or site.setup else "#!/usr/bin/env bash"
    lines = [shell, *(f"#SBATCH {flag}" for flag in flags), ""]
    lines += [f"module load {shlex.quote(module)} || exit 2" for module in site.modules]
    return lines + list(site.setup) + ([""] if site.modules or site.setup else [])


def _sbatch_quote(text: str) -> str:
    """A value as sbatch reads it in an #SBATCH line. Raises UserError for what no quoting saves."""
    if "\n" in text or "\\" in text:
        raise UserError(f"{text!r}: SLURM takes no backslash or line break in names of folders and jobs")
    if re.fullmatch(r"[A-Za-z0-9_./%:@=,+-]*", text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def _assign(name: str, value: str) -> str:
    return f"{name}={shlex.quote(value) if value else ''}"


def _array(name: str, words: Sequence[str]) -> str:
    return f"{name}=({shlex.join(words)})"


def _set(job: Job, task: Task) -> str:
    return f"set -- {shlex.join([*job.flags, *task.flags])}".rstrip()
