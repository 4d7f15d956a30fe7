"""Checks of a run as a whole: learning rate, kill and resume, evaluation, mixed precision, overfitting, finiteness."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from distcnn import checkpoint
from distcnn.build import order_of
from distcnn.optim import build_schedule
from distcnn.verify.evidence import Evidence, called, described, troubles
from distcnn.verify.launch import Trace
from distcnn.verify.plan import EPOCHS
from distcnn.verify.reference import learning_rate, relative
from distcnn.verify.result import Result, difference, few, plural

SAME_RATE = 1e-9  # relative to the peak: the formulas are written differently
SAME_LOSS = 1e-4  # of the evaluation, relative: images one by one instead of in tiles
HALF_LOSS = 0.05  # of the first step in bf16, relative
CURVE_POINTS = 2000


def check_runs(evidence: Evidence) -> Result:
    """Every run came to its end; made whatever else is checked."""
    result = Result("runs", demanded="each comes to its end")
    traces = list(evidence.traces.values())
    result.problems = [f"{described(trace)} failed: {trace.trouble}" for trace in traces if trace.trouble]
    seconds = sum(trace.seconds for trace in traces)
    result.measured = f"{plural(len(traces), 'run')} of real processes, {seconds:.0f} s in all"
    return result


def check_schedule(evidence: Evidence) -> Result:
    """The learning rate of every step against the formula, in the runs and over the user's whole run."""
    result = Result("schedule", demanded="a function of the step alone, as the formula says")
    optim, steps = evidence.config.optim, evidence.steps
    worst, points = 0.0, 0
    for trace in evidence.compared:
        for total, row in trace.by_step("update").items():
            apart = abs(row["lr"] - learning_rate(optim, steps, total)) / optim.lr
            worst, points = max(worst, apart), points + 1
            if apart > SAME_RATE:
                result.problems.append(_wrong_rate(evidence, trace, total, row["lr"]))
                break
        logged = {row["step"] - 1: row["train/lr"] for row in trace.metrics}
        used = {total: row["lr"] for total, row in trace.by_step("update").items()}
        if any(logged[total] != used.get(total) for total in logged):
            result.problems.append(f"with {called(trace)} metrics.jsonl logs other learning rates than those used")
    full = _full_steps(evidence)
    schedule = build_schedule(evidence.full.optim, full)
    for total in np.unique(np.linspace(0, evidence.full.optim.epochs * full - 1, CURVE_POINTS).astype(int)).tolist():
        apart = abs(schedule(total) - learning_rate(evidence.full.optim, full, total)) / evidence.full.optim.lr
        worst, points = max(worst, apart), points + 1
        if apart > SAME_RATE:
            result.problems.append(f"over the whole run the learning rate of step {total} is {schedule(total):.4g}")
            break
    result.problems += troubles(evidence.compared)
    result.figures = {"worst": worst, "points": points}
    result.measured = f"{points:,} steps, at most {worst:.1e} of the peak apart"
    return result


def _full_steps(evidence: Evidence) -> int:
    """Steps an epoch on the user's whole split."""
    return order_of(evidence.full, evidence.dataset).steps


def _wrong_rate(evidence: Evidence, trace: Trace, total: int, lr: float) -> str:
    optim, steps = evidence.config.optim, evidence.steps
    text = f"with {called(trace)} step {total} has the learning rate {lr:.4g} instead of "
    text += f"{learning_rate(optim, steps, total):.4g}"
    rates = {t: row["lr"] for t, row in trace.by_step("update").items()}
    for times in range(2, 2 * trace.processes + 1):
        fits = all(math.isclose(rate, _rate(evidence, times * t), rel_tol=1e-6) for t, rate in rates.items())
        if fits:
            return f"{text}, that of step {times * total}: the schedule goes {times} steps at a time"
    same = [t for t in range(EPOCHS * steps) if math.isclose(lr, _rate(evidence, t), rel_tol=1e-6)]
    return f"{text}, that of step {same[0]}" if same else text


def _rate(evidence: Evidence, total: int) -> float:
    return max(learning_rate(evidence.config.optim, evidence.steps, min(total, EPOCHS * evidence.steps)), 0.0)


def check_resume(evidence: Evidence) -> Result:
    """A run killed in the middle of an epoch and gone on with against one that was never stopped."""
    killed, resumed = evidence.traces["killed"], evidence.traces["resumed"]
    whole = evidence.traces[str(resumed.processes)]
    result = Result("resume", demanded="the bits of the run that was not stopped")
    result.problems += troubles([killed, resumed, whole])
    if result.problems:
        return result
    begun = next(row["total"] for row in resumed.rows("start"))
    if not begun:
        result.problems.append(f"after the kill in step {killed.run.kill_at} the run began anew instead of resuming")
    ends = [checkpoint.newest_whole(trace.run.config.output)[0] for trace in (resumed, whole)]
    assert ends[0] is not None and ends[1] is not None, "both runs are complete"
    mine, wanted = checkpoint.load(ends[0]), checkpoint.load(ends[1])
    worst = relative(mine.model, wanted.model)
    result.figures = {"weights": worst, "killed_in_step": killed.run.kill_at, "resumed_at_step": begun}
    if worst or mine.path.name != wanted.path.name:
        result.problems.append(f"the weights at the end differ by {worst:.1e} (relative)")
    if not _same(mine.trainer, wanted.trainer):
        result.problems.append("the optimizer's state at the end is another")
    if mine.ema is not None and wanted.ema is not None and relative(mine.ema, wanted.ema):
        result.problems.append("the averaged weights at the end are others")
    curves = [{row["step"]: row["train/loss"] for row in trace.metrics} for trace in (resumed, whole)]
    odd = sorted(total for total in curves[1] if curves[0].get(total) != curves[1][total])
    if odd:
        result.problems.append(f"the loss is another in {plural(len(odd), 'step')}: {few(odd)}")
    result.measured = (
        f"{called(killed)} killed in step {killed.run.kill_at}, went on from step {begun} with"
        f" {resumed.processes}: weights, optimizer, losses {difference(worst)}"
    )
    return result


def _same(mine: Any, wanted: Any) -> bool:
    """Whether two nested states are the same, tensors to the bit."""
    if isinstance(wanted, torch.Tensor):
        return isinstance(mine, torch.Tensor) and torch.equal(mine, wanted)
    if isinstance(wanted, dict):
        return mine.keys() == wanted.keys() and all(_same(mine[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(mine) == len(wanted) and all(_same(a, b) for a, b in zip(mine, wanted, strict=True))
    return bool(mine == wanted)


def check_evaluation(evidence: Evidence) -> Result:
    """Each validation sample counted once, the same counts from any processes, and those of a plain loop."""
    result = Result("evaluation", demanded=f"every sample once; equal counts; loss to {SAME_LOSS:.0e}")
    result.problems += troubles(evidence.compared)
    samples = evidence.small.manifest.split(evidence.config.data.val_split).samples
    worst = 0.0
    for trace in evidence.compared:
        found = trace.results
        if not found:
            continue
        counted = int(np.sum(found["confusion"]))
        if counted != samples:
            result.problems.append(f"with {called(trace)} {counted} samples were counted of {samples}")
        same = ("confusion", "val/loss", "val/top1", "per_class")
        if _same_end(evidence, trace) and any(found[key] != evidence.one.results.get(key) for key in same):
            result.problems.append(f"with {called(trace)} the same weights were found to be others than with 1")
        if trace is evidence.one or not _same_end(evidence, trace):
            worst = max(worst, _against_plain(evidence, trace, result))
    result.figures = {"samples": samples, "loss": worst}
    result.measured = f"{samples} samples; loss {worst:.1e} from a plain loop"
    return result


def _same_end(evidence: Evidence, trace: Trace) -> bool:
    """Whether a run has ended with the bits of the run with one process."""
    ends = [list(side.by_step("state").values())[-1:] for side in (trace, evidence.one)]
    return ends[0] == ends[1]


def _against_plain(evidence: Evidence, trace: Trace, result: Result) -> float:
    """Count again, image by image, with the weights that the run has ended with."""
    path = checkpoint.newest_whole(trace.run.config.output)[0]
    if path is None:
        return math.inf
    saved = checkpoint.load(path)
    confusion, loss = evidence.reference.evaluate(saved.ema or saved.model)
    half = evidence.config.run.mixed_precision == "bf16"
    other = int(np.abs(confusion - np.array(trace.results["confusion"])).sum()) // 2
    allowed = max(1, confusion.sum() // 50) if half else 0  # bf16: a near tie may fall the other way
    if other > allowed:
        result.problems.append(f"with {called(trace)} {plural(other, 'prediction')} differ from those of a plain loop")
    apart: float = abs(loss - trace.results["val/loss"]) / max(abs(loss), 1e-12)
    if apart > (HALF_LOSS if half else SAME_LOSS):
        result.problems.append(
            f"with {called(trace)} the loss is {trace.results['val/loss']:.6f}, by a plain loop {loss:.6f}"
        )
    return apart


def check_precision(evidence: Evidence) -> Result:
    """The loss in bf16 against float32: of the first step, and how far training drifts."""
    result = Result("precision", demanded=f"first loss within {HALF_LOSS:.0%}")
    traces = [evidence.one, evidence.traces["precision"]]
    result.problems += troubles(traces)
    if evidence.config.run.mixed_precision == "bf16":
        traces.reverse()
    full, half = ([row["train/loss"] for row in trace.metrics] for trace in traces)
    if not full or not half:
        return result
    apart = [abs(h - f) / max(abs(f), 1e-12) for f, h in zip(full, half, strict=False)]
    result.figures = {"first": apart[0], "largest": max(apart), "float32": full, "bf16": half}
    if not apart[0] <= HALF_LOSS:
        result.problems.append(f"the first loss is {half[0]:.4f} in bf16, {full[0]:.4f} in float32")
    if not all(map(math.isfinite, half)):
        result.problems.append("the loss in bf16 becomes non-finite")
    result.measured = (
        f"bf16 against float32: first loss {apart[0]:.1e} apart (relative), at most"
        f" {max(apart):.1e} in {plural(len(apart), 'step')}"
    )
    return result


def check_overfit(evidence: Evidence) -> Result:
    """Real steps on one small batch until the loss is near zero: model, labels, loss and optimizer fit together."""
    trace = evidence.traces["overfit"]
    result = Result("overfit")
    result.problems += troubles([trace])
    rows = trace.rows("overfit")
    if not rows:
        return result
    tries, target = rows[0]["tries"], rows[0]["target"]
    result.demanded = f"loss <= {target}"
    lr, losses = min(tries.items(), key=lambda item: item[1][-1] if math.isfinite(item[1][-1]) else math.inf)
    result.figures = {"tries": tries}
    result.measured = f"loss {losses[0]:.3g} to {losses[-1]:.2g} in {plural(len(losses), 'step')} at lr {lr}"
    if not losses[-1] <= target:
        text = f"the loss of one small batch, without augmentation, stays at {losses[-1]:.3g}"
        if rows[0]["in_time"]:
            result.problems.append(f"{text} after {len(losses)} steps, at any of --lr {', '.join(tries)}")
        else:
            result.skipped = f"{text} in the time there was"
    return result


def check_finite(evidence: Evidence) -> Result:
    """No loss, gradient or weight of any run is infinite or not a number."""
    result = Result("finite", demanded="no infinity, no NaN")
    numbers = 0
    for trace in evidence.traces.values():
        for row in trace.metrics:
            bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            numbers += sum(isinstance(value, float) for value in row.values())
            if bad:
                result.problems.append(f"with {called(trace)} {bad[0]} of step {row['step'] - 1} is {row[bad[0]]}")
                break
        updates = trace.rows("update")
        numbers += len(updates)
        broken = [row["total"] for row in updates if not row["finite"]]
        if broken:
            result.problems.append(f"with {called(trace)} the gradient of step {broken[0]} is not finite")
        path = checkpoint.newest_whole(trace.run.config.output)[0]
        model = checkpoint.load(path).model if path else {}
        for name, tensor in model.items():
            numbers += tensor.numel()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                result.problems.append(f"with {called(trace)} {name} of {path} is not finite")
    result.problems += troubles(list(evidence.traces.values()))
    result.figures = {"numbers": numbers}
    result.measured = f"{numbers:,} losses, gradients and weights of {plural(len(evidence.traces), 'run')}"
    return result
