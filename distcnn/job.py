"""A run under way: what it is made of, how it is built, saved and put back where it stood."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distcnn import checkpoint
from distcnn.augment import Augment
from distcnn.batchnorm import TileStatistics
from distcnn.blackbox import BlackBox
from distcnn.build import (
    Dataset,
    make_augment,
    make_balance,
    make_loader,
    make_loss,
    make_model,
    make_order,
    make_training_loader,
)
from distcnn.config import TrainConfig, flatten
from distcnn.console import Console
from distcnn.data.balance import Balance
from distcnn.data.loader import BadSample, Loader
from distcnn.distill import Teacher, check_same_teacher, load_teacher
from distcnn.distributed import Runtime, broken_by_another, process_cores
from distcnn.ema import Ema, Lookahead, first_share
from distcnn.errors import LostRank, UserError
from distcnn.gauge import Gauge, gauge_of
from distcnn.heartbeat import SAVE, Pulse
from distcnn.heartbeat import clear as clear_heartbeats
from distcnn.lag import Flags
from distcnn.limits import refuse_what_is_not_finite
from distcnn.losses import Loss
from distcnn.meter import Meter
from distcnn.optim import Schedule, build_optimizer, build_schedule
from distcnn.outcome import forget_outcomes
from distcnn.preempt import STOP_FILE, Preempted, StopRequest, clear_stop_file
from distcnn.results import machine_facts, run_facts
from distcnn.runfolder import LEDGER, QUARANTINE, RowFile, check_same_run, cut_rows, open_run, save_config
from distcnn.sessions import SESSIONS, note_end, start_row
from distcnn.start import set_first_weights
from distcnn.starts import count_start
from distcnn.state import Identity, Ledger, Position
from distcnn.stragglers import Stragglers
from distcnn.times import Times
from distcnn.tracking import Tracker
from distcnn.world import World, accelerates_precision, torchrun_restarts

MOST_OF_FIRST = 0.01  # of the weights that a run with --lookahead begins with, at its end


@dataclass
class Job:
    """Everything a run is made of. What is not constant stands in `position`, `ledger`, `losses` and `best`."""

    config: TrainConfig
    dataset: Dataset
    runtime: Runtime
    console: Console
    model: nn.Module  # the plain module, whose weights are trained
    wrapped: nn.Module  # the same in DDP
    optimizer: torch.optim.Optimizer
    statistics: TileStatistics
    schedule: Schedule
    augment: Augment
    loss: Loss
    loader: Loader
    val_loader: Loader
    identity: Identity
    meter: Meter
    gauge: Gauge
    stop: StopRequest
    writer: checkpoint.Writer  # used by rank 0
    flags: Flags
    pulse: Pulse
    stragglers: Stragglers
    times: Times
    blackbox: BlackBox
    ema: Ema | None = None
    lookahead: Lookahead | None = None
    teacher: Teacher | None = None
    balance: Balance | None = None
    tracker: Tracker | None = None  # rank 0 only
    position: Position = field(default_factory=Position)
    ledger: Ledger = field(default_factory=Ledger)  # rank 0's holds what earlier processes counted, too
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum and number of steps since the last row
    best: dict[str, float] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)  # when rank 0 last began a checkpoint
    bad_steps: int = 0  # left out in a row because something was not finite
    left_out: int = 0  # steps of this process, for that reason
    files: dict[str, RowFile] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.config.output

    @property
    def is_main(self) -> bool:
        return self.runtime.world.is_main

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to a file of the run folder."""
        self.files.setdefault(name, RowFile(self.run / name, self.console.warn)).add(row)


def check_lanes(config: TrainConfig, world: World, console: Console) -> None:
    """Refuse more processes than lanes; say what an uneven share costs."""
    lanes = config.geometry.lanes
    try:
        config.geometry.lanes_of(world.rank, world.size)
    except ValueError as error:
        raise UserError(str(error)) from error
    most = -(-lanes // world.size)
    if lanes % world.size:
        share = 1 - lanes / (most * world.size)
        console.warn(
            f"{lanes} lanes on {world.size} processes: some compute {most} tiles a step, others fewer, so"
            f" {share:.0%} of the processes' time is idle and sums differ in the last bits"
        )
        if config.model.batch_norm == "sync":
            raise UserError(
                f"--batch-norm sync needs as many tiles on each process: {lanes} lanes on {world.size} do not"
            )
    elif most & (most - 1) and world.size > 1:
        console.warn(f"{most} tiles a process are no power of two: sums differ in the last bits from one process's")


def check_precision(config: TrainConfig, console: Console) -> None:
    """Say so where Accelerate's launcher was asked for a precision that the config does not have."""
    asked = accelerates_precision()
    if asked not in ("", "no", config.run.mixed_precision):
        console.warn(
            f"accelerate launch asks for mixed precision {asked}, which is not used: the run's own flags decide;"
            f" give --mixed-precision {asked} to train.py"
        )


def claim_run(config: TrainConfig, runtime: Runtime, console: Console) -> Path | None:
    """Rank 0 opens the run folder and decides what to resume from; all ranks learn it, or the error."""
    answer: dict[str, Any] = {}
    if runtime.world.is_main:
        try:
            found, warnings = open_run(config)
            count_start(config.output, checkpoint.step_of(found) if found else 0)
            note_end(config.output)
            clear_heartbeats(config.output)
            stop = clear_stop_file(config.output, torchrun_restarts())
            answer = {"path": str(found) if found else "", "warnings": warnings, "stop": stop}
        except UserError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"--output {config.output} cannot be written: {error.strerror or error}"}
    try:
        answer = runtime.broadcast(answer)
    except RuntimeError as error:
        if not broken_by_another(error):
            raise
        raise LostRank(
            "another process of this run ended while it was starting", speaks=runtime.world.is_main
        ) from error
    if "error" in answer:
        raise UserError(answer["error"])
    console.log_to(config.output / "log.txt")
    for warning in answer["warnings"]:
        console.warn(warning)
    if answer["stop"]:
        raise Preempted(f"the file {config.output / STOP_FILE}", saved=True)
    return Path(answer["path"]) if answer["path"] else None


def build_job(
    config: TrainConfig,
    dataset: Dataset,
    runtime: Runtime,
    console: Console,
    stop: StopRequest,
    pulse: Pulse | None = None,
    resumed: bool = False,
) -> Job:
    """Build model, optimizer, loaders. Nothing is read from a checkpoint yet.

    `resumed`: the weights will come from one, so that what only a new run begins with is left out.
    """
    gpu = runtime.device.type == "cuda"
    threads = config.data.decode_threads or max(process_cores() // runtime.world.local_size, 1)
    loader = make_training_loader(config, dataset, runtime.world, threads, runtime.device)
    # A lambda, since copies of the model (EMA) would copy what a bound method is bound to.
    model = make_model(config, dataset, lambda sums: runtime.sum_with_gradient(sums))
    if not resumed:
        set_first_weights(config, dataset, model, runtime, console, threads)
    model = model.to(runtime.device)
    ema = Ema(model, config.optim.ema_decay) if config.optim.ema_decay else None
    if config.run.compile:
        model.compile()
    wrapped, optimizer = runtime.prepare(model, build_optimizer(config.optim, model))
    balance = make_balance(config, dataset, loader.reader)
    steps = make_order(config, loader.reader.counts, 0, balance).steps
    schedule = build_schedule(config.optim, steps)
    fingerprint = dataset.manifest.fingerprint()
    pulse = pulse or Pulse(runtime.world)
    return Job(
        config=config,
        dataset=dataset,
        runtime=runtime,
        console=console,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        statistics=TileStatistics(model),
        schedule=schedule,
        augment=make_augment(config, dataset),
        loss=make_loss(config, dataset, runtime.device),
        loader=loader,
        val_loader=make_loader(config, dataset, config.data.val_split, False, threads, gpu, runtime.device),
        identity=Identity.of(fingerprint, config.run.seed, config.geometry, config.data.window_shards),
        meter=Meter(loader.stats),
        gauge=gauge_of(config, len(dataset.classes), dataset.size, runtime.device, runtime.world.size),
        stop=stop,
        writer=checkpoint.Writer(config.output, config.run.keep_checkpoints, console.warn),
        flags=Flags(runtime.device),
        pulse=pulse,
        times=Times(pulse, loader.stats),
        stragglers=Stragglers(runtime.world.rank, runtime.world.size, console.warn),
        blackbox=BlackBox(Flags.LAG if gpu else 0),
        ema=ema,
        lookahead=make_lookahead(config, model, schedule.total, console),
        teacher=load_teacher(config, dataset, runtime.device),
        balance=balance,
    )


def make_lookahead(config: TrainConfig, model: nn.Module, total: int, console: Console) -> Lookahead | None:
    """The slow weights of a run of `total` steps, if it is to have any. Says so where it has too few steps for them."""
    every = config.optim.lookahead
    if not every:
        return None
    share = first_share(every, max(total, 1))
    if share > MOST_OF_FIRST:
        console.warn(
            f"--lookahead {every}: in a run of {total} steps {share:.0%} of the weights at the end are those it began"
            " with: a smaller number, or more epochs"
        )
    return Lookahead(model, every, total)


def restore(job: Job, path: Path | None) -> None:
    """Put the job where a checkpoint left off; every rank reads it."""
    if path is None:
        return
    saved = checkpoint.load(path)
    _check_same_data(job, saved.state, str(path))
    job.identity.check(saved.state["identity"], str(path))
    check_same_run(job.config, saved.state["config"], str(path))
    check_same_teacher(job.teacher, saved.state.get("teacher"), str(path))
    job.model.load_state_dict(saved.model)
    if job.ema:
        if saved.ema is None:
            raise UserError(f"{path} has no averaged weights: --ema-decay 0, or a new --output")
        job.ema.model.load_state_dict(saved.ema)
    if job.lookahead:
        job.lookahead.load(saved.trainer["lookahead"])
    job.optimizer.load_state_dict(saved.trainer["optimizer"])
    if job.runtime.accelerator.scaler and saved.trainer["scaler"]:
        job.runtime.accelerator.scaler.load_state_dict(saved.trainer["scaler"])
    job.position = Position(**saved.state["position"])
    job.losses = list(saved.state["losses"])
    job.best = dict(saved.state["best"])
    if job.is_main:
        job.ledger = Ledger(**saved.state["ledger"])


def _check_same_data(job: Job, state: dict[str, Any], where: str) -> None:
    """Raises UserError with what differs if the checkpoint in `where` was trained on another data set."""
    was, now = state["identity"]["fingerprint"], job.identity.fingerprint
    if was == now:
        return
    before, classes = state["classes"], list(job.dataset.classes)
    samples = {name: split.samples for name, split in job.dataset.manifest.splits.items()}
    if before != classes:
        gone, new = ([name for name in a if name not in b][:5] for a, b in ((before, classes), (classes, before)))
        changes = [
            f"{word} {', '.join(map(repr, names))}" for word, names in (("without", gone), ("with", new)) if names
        ]
        what = " and ".join(changes) or "in another order"
        difference = f"{len(before)} classes were, {len(classes)} are now, {what}"
    elif state.get("samples", samples) != samples:
        difference = f"images were {state['samples']}, are now {samples}"
    else:
        difference = f"as many images, but not the same (fingerprint {was[:12]}, now {now[:12]})"
    raise UserError(
        f"{where} was trained on another data set than {job.dataset.root} ({difference}): give that one with --data, a"
        " new --output, or --resume never to begin anew"
    )


def begin_tracking(job: Job, resumed: Path | None) -> None:
    """Open the run's files, cut what lies beyond the position, and say what begins."""
    config, world = job.config, job.runtime.world

    def note_bad(bad: BadSample) -> None:
        job.append(QUARANTINE, dataclasses.asdict(bad) | {"rank": world.rank})

    job.loader.on_bad = job.val_loader.on_bad = note_bad
    if not job.is_main:
        return
    if config.data.loader == "stream":
        job.console.warn(
            "--loader stream: samples are drawn with replacement; neither that each comes once, nor the same run on"
            " resumption or on another number of processes, is promised"
        )
    save_config(config)
    cut_rows(job.run / LEDGER, lambda row: row["epoch"] < job.position.epoch)
    forget_outcomes(job.run, job.position)
    facts = machine_facts(job)
    job.append(SESSIONS, start_row(job.position.total, job.position.epoch, world.size, facts))
    wandb_id = checkpoint.load(resumed).state["wandb_id"] if resumed else ""
    settings = flatten(config) | facts | {"world_size": world.size, "classes": list(job.dataset.classes)}
    job.tracker = Tracker(job.run, config.run, settings, job.position, wandb_id, job.console.warn)
    parameters = sum(p.numel() for p in job.model.parameters())
    geometry, processes = config.geometry, "1 process" if world.size == 1 else f"{world.size} processes"
    job.console.say(
        f"{config.model.model} ({parameters:,} parameters) on {config.data.data}: {len(job.loader.reader):,} images of"
        f" {len(job.dataset.classes)} classes at {job.dataset.size} px; {processes} on"
        f" {job.runtime.device.type}, {geometry.lanes} lanes of {geometry.tile}, {config.run.reduction} reduction"
    )
    if job.balance:
        job.console.say(
            f"--balance {config.optim.balance}: {job.balance.samples:,} images an epoch, some up to"
            f" {job.balance.most:,} times, each time augmented anew"
        )
    if job.teacher:
        weight, temperature = config.optim.distill_weight, config.optim.distill_temperature
        job.console.say(f"teacher: {job.teacher.path}, {weight:g} of the loss, temperature {temperature:g}")
    if resumed:
        job.console.say(
            f"resuming {job.run} from {resumed.name} (epoch {job.position.epoch + 1}, step {job.position.step})"
        )


def is_over(job: Job) -> bool:
    """Whether all epochs are done, or --patience is: so many evaluations have found nothing better than the best."""
    if job.position.epoch >= job.config.optim.epochs:
        return True
    patience = job.config.optim.patience
    waited = (job.position.epoch - 1 - job.best.get("epoch", math.inf)) / job.config.run.eval_every
    return bool(patience) and waited >= patience


def save(job: Job, best: bool = False) -> None:
    """Begin to write a checkpoint on rank 0. A full disk is a warning: the old one stays, the next save tries again."""
    job.pulse.mark(SAVE, job.position)
    refuse_what_is_not_finite(job)
    ledger = Ledger.from_integers(job.runtime.sum_integers(job.ledger.as_integers()))
    if not job.is_main:
        return
    state = {
        "identity": dataclasses.asdict(job.identity),
        "position": dataclasses.asdict(job.position),
        "ledger": dataclasses.asdict(ledger),
        "losses": job.losses,
        "best": job.best,
        "wandb_id": job.tracker.wandb_id if job.tracker else "",
        **run_facts(job),
    }
    scaler = job.runtime.accelerator.scaler
    trainer = {"optimizer": job.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
    if job.lookahead:
        trainer["lookahead"] = job.lookahead.slow
    ema = job.ema.model.state_dict() if job.ema else None
    job.saved_at = time.monotonic()
    job.writer.save(job.position.total, job.model.state_dict(), ema, trainer, state, best)


def settle_last_save(job: Job) -> None:
    """Wait for the last checkpoint; if it was not written, try once more, then raise UserError. All ranks call it."""
    for last in (False, True):
        job.writer.wait()
        if not job.runtime.broadcast(job.writer.failed):
            return
        if last:
            raise UserError(
                f"the last checkpoint of {job.run} cannot be written ({job.writer.failed}): make space, then give the"
                " same command again; it goes on from the checkpoint before"
            )
        save(job, best=job.best.get("epoch") == job.position.epoch - 1)
