"""The training run: build, then the loop, then the results. Read `train` from top to bottom.

N samples of a tile, K classes. All of it runs on every rank; what only rank 0 does says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

from distcnn.build import compute_threads, make_order, open_dataset
from distcnn.config import TrainConfig
from distcnn.console import Console, percent
from distcnn.data.loader import Tile, training_requests
from distcnn.data.order import EpochOrder
from distcnn.distributed import Runtime, process_cores
from distcnn.evaluate import evaluate
from distcnn.heartbeat import COMPUTE, DATA, EVALUATE, FINISH, REDUCE
from distcnn.job import (
    Job,
    begin_tracking,
    build_job,
    check_lanes,
    check_precision,
    claim_run,
    is_over,
    restore,
    save,
    settle_last_save,
)
from distcnn.limits import check_bad_share, check_finite
from distcnn.losses import loss_sum
from distcnn.memory import keep_freed_memory
from distcnn.metrics import Evaluation
from distcnn.optim import set_learning_rate
from distcnn.pixels import to_device
from distcnn.preempt import Preempted, StopRequest
from distcnn.results import finish, keep_outcome, report_known, report_stopped
from distcnn.runfolder import LEDGER
from distcnn.starts import counted
from distcnn.state import Ledger, Position
from distcnn.tiles import blank, forward_seed
from distcnn.times import file_of
from distcnn.watchdog import watched
from distcnn.world import World

EVALUATION_TILE = 32


def train(config: TrainConfig, world: World, watch: Callable[[Job], None] | None = None) -> dict[str, Any]:
    """Train as `config` says, resuming where the run folder stopped; returns what results.json holds.

    `watch` is handed the job before the first step, to look on (as `distcnn verify` does).
    Raises UserError for whatever the user can mend, before anything is changed, and Preempted when it was asked to
    stop and has saved itself.
    """
    started = time.monotonic()
    console = Console(world.is_main, config.run.quiet)
    dataset = open_dataset(config, world)
    check_lanes(config, world, console)
    check_precision(config, console)
    with StopRequest(config.output, world.is_main, 60 * config.run.time_limit) as stop:
        runtime = Runtime(config.run, world, compute_threads(config, dataset, world, process_cores()))
        if runtime.device.type == "cpu":
            keep_freed_memory()
        try:
            resume_from = claim_run(config, runtime, console)
            limit = config.run.stall_timeout
            with counted(config.output, world.is_main), watched(config.output, world, limit) as pulse:
                job = build_job(config, dataset, runtime, console, stop, pulse, resumed=resume_from is not None)
                restore(job, resume_from)
                if is_over(job) and (known := report_known(job)):
                    return known
                begin_tracking(job, resume_from)
                if watch:
                    watch(job)
                return run_epochs(job, started)
        finally:
            runtime.close()


def run_epochs(job: Job, started: float) -> dict[str, Any]:
    """From the position to the end of the run."""
    evaluation = None
    job.stop.begin()
    try:
        while not is_over(job):
            try:
                train_epoch(job)
            finally:
                note_times(job)
            evaluation = close_epoch(job)
        if evaluation is None:  # it was ended between the last checkpoint and its results
            evaluation = evaluate_now(job)
        job.pulse.mark(FINISH)
        settle_last_save(job)
        return finish(job, evaluation, time.monotonic() - started)
    except Preempted as request:
        report_stopped(job, request, time.monotonic() - started)
        raise
    finally:
        job.writer.wait()
        job.loader.close()
        job.val_loader.close()


def train_epoch(job: Job) -> None:
    """From the position to the end of its epoch."""
    config, world = job.config, job.runtime.world
    order = epoch_order(job, job.position.epoch)
    lanes = job.config.geometry.lanes_of(world.rank, world.size)
    title, text = f"epoch {job.position.epoch + 1}/{config.optim.epochs}", ""
    requests = job.pulse.follow(training_requests(order, lanes, job.position.step), job.loader.reader)
    with job.console.progress(title, order.samples, order.consumed(job.position.step)) as advance:
        job.meter.start()
        job.pulse.mark(DATA, job.position)
        for tiles in job.loader.steps(requests):
            samples = sum(order.tile_sizes(job.position.step))
            lr = job.schedule(job.position.total)
            loss, norm, flags = train_step(job, tiles, samples, lr)
            job.position = job.position.advance(samples)
            check_finite(job, left_out=flags[2] > 0)
            for tile in tiles:
                job.ledger.add(tile.request.ids)
            check_bad_share(job)
            job.meter.add(loss, samples)
            if job.position.total % config.run.log_every == 0 or job.position.step == order.steps:
                text = log_row(job, lr, norm)
            advance(samples, text)
            if job.position.step < order.steps:  # after the last step the epoch's end decides
                obey(job, flags)
            job.pulse.step_made(job.position)
        job.meter.stop()


def note_times(job: Job) -> None:
    """Every rank writes where its time went, in a file of its own."""
    world, position = job.runtime.world, job.position
    place = {"epoch": position.epoch, "step": position.step, "size": world.size}
    job.append(file_of(world.rank), place | job.times.row())


def train_step(job: Job, tiles: list[Tile], samples: int, lr: float) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """One optimizer step on this rank's tiles of a step of `samples` samples over all ranks.

    Returns the step's mean loss and the gradient's norm, two scalars on the device that nobody has waited for, and
    the flags that all ranks agree on: how many want to stop, whether to save, whether the step was left out. A step
    whose loss or gradient is not finite changes nothing.
    """
    runtime, stragglers, statistics = job.runtime, job.stragglers, job.statistics
    for tile in tiles:
        last = tile is tiles[-1]
        seen = len(tile.labels)
        job.pulse.mark(COMPUTE)
        begun = time.monotonic()
        x_NCHW, targets = job.augment(tile if seen else blank(tile), runtime.device, train=True)
        job.times.augment_seconds += time.monotonic() - begun
        if job.teacher:
            with runtime.accelerator.autocast():
                targets = job.teacher.teach(x_NCHW, targets)
        torch.manual_seed(forward_seed(job.config.run.seed, tile.request))
        statistics.begin(seen)
        with runtime.tile(job.wrapped, last):
            with runtime.accelerator.autocast():
                logits_NK = job.wrapped(x_NCHW)
            loss = loss_sum(logits_NK, targets, job.loss) / samples
            if last:
                job.pulse.mark(REDUCE)
            runtime.backward(loss, last)
        job.blackbox.tile(tile.request.lane, loss)
        wishes = torch.tensor([wants_stop(job), wants_save(job)] if last else [0.0, 0.0], dtype=torch.float64)
        times = stragglers.mine(*(job.pulse.take_seconds() if last else (0.0, 0.0)))
        wishes_and_times = to_device(torch.cat([wishes, times]).numpy(), loss.device)
        runtime.add(torch.cat([loss.detach().to(torch.float64)[None], wishes_and_times, statistics.collect(seen)]))
    totals = runtime.totals()
    norm = runtime.gradient_norm(job.config.optim.clip_grad_norm)
    finite = torch.isfinite(norm) & torch.isfinite(totals[0])
    set_learning_rate(job.optimizer, lr, job.schedule.done(job.position.total))
    runtime.skip_unless(job.optimizer, finite)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    statistics.apply(totals[3 + stragglers.length :], samples, finite)
    stragglers.add(totals[3 : 3 + stragglers.length])
    if job.lookahead:
        job.lookahead.update(job.model, job.position.total + 1)
    if job.ema:
        job.ema.update(job.model)
    job.blackbox.step(job.position)
    return totals[0], norm, job.flags.read(torch.stack([totals[1], totals[2], (~finite).to(torch.float64)]))


def wants_stop(job: Job) -> float:
    """1 if this rank was asked to stop."""
    return float(job.stop.wanted(job.writer.seconds))


def wants_save(job: Job) -> float:
    """1 if rank 0 finds that it is time for a checkpoint by the clock."""
    minutes = job.config.run.checkpoint_minutes
    return float(job.is_main and minutes > 0 and time.monotonic() - job.saved_at >= 60 * minutes)


def obey(job: Job, flags: list[float]) -> None:
    """Do what all ranks have agreed on: stop (raises Preempted), or save."""
    stop, wanted, _ = flags
    every = job.config.run.checkpoint_every
    if stop:
        stop_here(job)
    elif wanted or (every and job.position.total % every == 0):
        job.meter.settle(job.losses)
        save(job)


def stop_here(job: Job) -> NoReturn:
    """Save if there is time for it, wait until it is written, and raise Preempted. All ranks call it together."""
    reason = job.stop.reason or "another process was asked to stop"
    job.stop.saving = True
    can_save = job.runtime.sum_integers(np.array([not job.stop.can_save(job.writer.seconds)]))[0] == 0
    if can_save:
        job.meter.settle(job.losses)
        save(job)
        job.writer.wait()
    job.runtime.barrier()
    raise Preempted(reason, bool(can_save) and not job.writer.failed)


def log_row(job: Job, lr: float, norm: torch.Tensor) -> str:
    """Write a row of metrics; returns what the progress line shows. Waits for the device."""
    row = job.meter.row(job.losses) | {"train/lr": lr, "train/grad_norm": float(norm)} | job.stragglers.row()
    row |= {"train/left_out": job.left_out} | job.gauge.row(row["perf/images_per_second"])
    row |= job.times.shares()
    if job.tracker:
        job.tracker.log(place(job.position) | {name: value for name, value in row.items() if math.isfinite(value)})
    return f"loss {row['train/loss']:.4f}  {row['perf/images_per_second']:,.0f} images/s"


def close_epoch(job: Job) -> Evaluation | None:
    """Prove the epoch, evaluate, save, and step into the next. Returns the evaluation, or None if none was due.

    A stop that is asked for before or during the evaluation is obeyed at the epoch's last step: the evaluation is
    then the first thing that the resumed run does.
    """
    epoch, config = job.position.epoch, job.config
    job.pulse.mark(EVALUATE, job.position)
    total = Ledger.from_integers(job.runtime.sum_integers(job.ledger.as_integers()))
    row = total.row(epoch, len(job.loader.reader), job.balance.times(epoch) if job.balance else None)
    if config.data.loader == "stream":
        row = {"epoch": epoch, "samples": total.count, "exactly_once": False}  # drawn with replacement: not promised
    elif not row["exactly_once"]:
        raise RuntimeError(f"epoch {epoch} was not exactly once: {row}; this is a defect of distcnn, please report it")
    if any_rank(job, bool(wants_stop(job))):
        stop_here(job)
    evaluation = None
    if (epoch + 1) % config.run.eval_every == 0 or epoch + 1 == config.optim.epochs:
        evaluation = evaluate_now(job)
    if job.is_main:
        job.append(LEDGER, row)
    job.ledger = Ledger()
    job.position = job.position.next_epoch()
    if evaluation:
        note_evaluation(job, evaluation)
    save(job, best=job.best.get("epoch") == epoch)
    return evaluation


def evaluate_now(job: Job) -> Evaluation:
    """Evaluate the averaged weights, or the trained ones where nothing is averaged."""
    model = job.ema.model if job.ema else job.model
    tile = max(job.config.optim.tile_size, EVALUATION_TILE)
    classes = job.dataset.classes

    def give_up() -> bool:
        job.pulse.mark(EVALUATE)
        return bool(wants_stop(job))

    with job.console.progress("evaluation", len(job.val_loader.reader)) as advance:
        views = job.config.optim.tta
        found = evaluate(job.runtime, model, job.val_loader, job.augment, tile, classes, advance, give_up, views)
    if found is None:
        stop_here(job)
    return found


def note_evaluation(job: Job, found: Evaluation) -> None:
    """Write the metrics, and note whether they are the best so far."""
    epoch, values = job.position.epoch - 1, found.summary()
    best = values["top1"] > job.best.get("top1", -1.0)
    if best:
        job.best = {"epoch": epoch, "top1": values["top1"], "step": job.position.total}
    if job.is_main:
        keep_outcome(job, found, best)
    if job.tracker:
        job.tracker.log({**place(job.position), **{f"val/{name}": value for name, value in values.items()}})
    job.console.say(
        f"epoch {epoch + 1}/{job.config.optim.epochs}  val top-1 {percent(values['top1'])}"
        f" [{percent(values['top1_low'])}, {percent(values['top1_high'])}]  loss {values['loss']:.4f}"
    )


def any_rank(job: Job, mine: bool) -> bool:
    """Whether it is so on any rank."""
    return bool(job.runtime.sum_integers(np.array([mine], dtype=np.int64))[0])


def place(position: Position) -> dict[str, int]:
    """Where a row of metrics belongs."""
    return {"step": position.total, "epoch": position.epoch, "samples_seen": position.samples}


def epoch_order(job: Job, epoch: int) -> EpochOrder:
    return make_order(job.config, job.loader.reader.counts, epoch, job.balance)
