"""Checks of what is summed over tiles and processes: gradients and the statistics of batch norm."""

from __future__ import annotations

import torch

from distcnn import checkpoint
from distcnn.ema import lookahead_decay
from distcnn.verify import blame
from distcnn.verify.evidence import Evidence, called, disagreement, kept, troubles
from distcnn.verify.launch import Trace
from distcnn.verify.reference import Step, Tensors, along, clipped, flat, relative
from distcnn.verify.result import Result, among, plural

# Relative differences of norms that are allowed. float32 sums in another order differ by about 1e-7; a defect by much
# more. With bf16 the two forward passes round their activations differently.
AGAINST_LOOP = {"no": 1e-4, "bf16": 0.1}
STATISTICS = {"no": 1e-3, "bf16": 0.1}
OTHER_ORDER = 1e-5


def check_gradients(evidence: Evidence) -> Result:
    """The first gradient against a plain loop, and that of every step between numbers of processes."""
    limit = AGAINST_LOOP[evidence.config.run.mixed_precision]
    promised = all(evidence.exact(trace) for trace in evidence.compared)
    bits = "equal bits at any number" if promised else f"equal bits where promised, else {OTHER_ORDER:.0e} at first"
    result = Result("gradients", demanded=f"{bits}; a plain loop's to {limit:.0e}")
    result.problems += troubles(evidence.compared)
    worst = 0.0
    for trace in evidence.compared:
        apart = _against_loop(evidence, trace, 0, limit, result)
        worst = max(worst, apart)
        result.figures[f"loop/{trace.processes}"] = apart
        for kind, what in (("update", "gradients"), ("state", "weights")):
            problem = disagreement(trace, kind, what)
            if problem:
                result.problems.append(f"{problem}: they were not summed over the processes")
                break
    found: dict[str, list[int]] = {}
    for trace in evidence.compared[1:]:
        steps, text = _between(evidence, trace, result)
        found.setdefault(text, []).append(trace.processes)
        result.figures[f"steps/{trace.processes}"] = steps
    texts = [f"{among(numbers)} processes and 1: {text}" for text, numbers in found.items()]
    result.measured = "; ".join([*texts, f"at most {worst:.1e} from a plain loop"])
    return result


def _between(evidence: Evidence, trace: Trace, result: Result) -> tuple[int, str]:
    """Compare a run with that of one process; (steps with equal bits, in words)."""
    one, exact = evidence.one, evidence.exact(trace)
    mine, wanted = trace.by_step("update"), one.by_step("update")
    before, before_one = trace.by_step("state"), one.by_step("state")
    equal = 0
    for total in sorted(before.keys() & before_one.keys()):
        if before[total]["weights"] != before_one[total]["weights"]:
            if exact:
                result.problems.append(
                    f"with {called(trace)} the weights are others than with 1 from step {total} on, though the"
                    " gradient before was the same: look at the learning rate and the optimizer"
                )
            break
        if total not in mine or total not in wanted:
            break
        if mine[total]["gradients"] != wanted[total]["gradients"]:
            apart = _apart(trace, one, total)
            if exact or apart > OTHER_ORDER:
                result.problems.append(_other_sum(trace, total, apart))
            return equal, f"{apart:.1e} apart at step {total}"
        equal += 1
    return equal, f"equal to the bit in {plural(equal, 'step')}"


def _other_sum(trace: Trace, total: int, apart: float) -> str:
    text = f"with {called(trace)} the gradient of step {total} is not that of 1 process"
    if apart < OTHER_ORDER:
        return f"{text} in its last bits (relative difference {apart:.1e}): the sum was made in another order"
    return f"{text}: relative difference {apart:.1e}"


def _apart(trace: Trace, one: Trace, total: int) -> float:
    """How far the gradients of a step are apart; where they were not kept, how far the last checkpoints are."""
    mine, wanted = kept(trace, f"gradients-{total}"), kept(one, f"gradients-{total}")
    if mine and wanted:
        return relative(mine, wanted)
    ends = [checkpoint.newest_whole(side.run.config.output)[0] for side in (trace, one)]
    if ends[0] is None or ends[1] is None:
        return float("inf")
    return relative(checkpoint.load(ends[0]).model, checkpoint.load(ends[1]).model)


def check_accumulation(evidence: Evidence) -> Result:
    """The gradient of the epoch's last step, whose tiles are not full, is that of the mean over its samples."""
    limit = AGAINST_LOOP[evidence.config.run.mixed_precision]
    result = Result("accumulation", demanded=f"the gradient of the mean over the step's samples, to {limit:.0e}")
    last = evidence.steps - 1
    order = evidence.reference.order(0)
    samples = sum(order.tile_sizes(last))
    worst = 0.0
    for trace in evidence.compared:
        apart = _against_loop(evidence, trace, last, limit, result)
        result.figures[f"loop/{trace.processes}"] = apart
        worst = max(worst, apart)
    result.problems += troubles(evidence.compared)
    result.figures["samples"] = samples
    batch = evidence.config.geometry.global_batch
    result.measured = f"a step of {samples} instead of {batch} samples: at most {worst:.1e} from a plain loop"
    return result


def _against_loop(evidence: Evidence, trace: Trace, total: int, limit: float, result: Result) -> float:
    """The relative difference of a gradient from that of the plain loop; what is wrong goes into the result."""
    got, state = kept(trace, f"gradients-{total}"), kept(trace, f"state-{total}")
    if not got or not state:
        if not trace.trouble:
            result.problems.append(f"the run with {called(trace)} kept no gradient of step {total}")
        return float("inf")
    clip = evidence.config.optim.clip_grad_norm
    step = evidence.reference.step(state, *divmod(total, evidence.steps))
    apart = relative(got, clipped(step.gradients, clip))
    if apart > limit:
        result.problems.append(_why(evidence, trace, total, got, state, step, apart))
    return apart


def _why(evidence: Evidence, trace: Trace, total: int, got: Tensors, state: Tensors, step: Step, apart: float) -> str:
    """Say what is wrong with a gradient."""
    ratio, cosine = along(got, step.gradients)
    text = (
        f"with {called(trace)} the gradient of step {total} is {apart:.1e} from that of a plain loop"
        f" (length {ratio:.3g} times, cosine {cosine:.4f})"
    )
    values = sum(t.numel() for t in got.values())
    if 4 * values * len(step.sizes) > blame.MAX_BYTES:
        return text
    shares = evidence.reference.step(state, *divmod(total, evidence.steps), by_lane=True).shares
    factors, rest = blame.factors_of(shares, flat(_unclipped(evidence, trace, total, got)))
    return f"{text}: {blame.explain(factors, rest, step.sizes, evidence.config, trace.processes)}"


def _unclipped(evidence: Evidence, trace: Trace, total: int, got: Tensors) -> Tensors:
    """A gradient as it was before it was scaled down to --clip-grad-norm."""
    clip = evidence.config.optim.clip_grad_norm
    norm = next((row["train/grad_norm"] for row in trace.metrics if row["step"] == total + 1), 0.0)
    scale = max(1.0, norm / clip) if clip else 1.0
    return {name: tensor * scale for name, tensor in got.items()}


def check_batchnorm(evidence: Evidence) -> Result:
    """How far the running statistics move in a step: the mean over all samples, whoever has seen them."""
    limit = STATISTICS[evidence.config.run.mixed_precision]
    result = Result("batchnorm", demanded=f"the mean over all tiles of all processes, to {limit:.0e}")
    result.problems += troubles(evidence.compared)
    if not evidence.reference.norms:
        result.skipped = "the model has no batch norm with running statistics that move"
        return result
    worst = 0.0
    for trace in evidence.compared:
        steps = _undisturbed(evidence, sorted({0, evidence.steps - 1}))
        apart = max(_movement(evidence, trace, total, limit, result) for total in steps)
        worst = max(worst, apart)
        result.figures[f"loop/{trace.processes}"] = apart
        problem = disagreement(trace, "state", "buffers") or _other_buffers(evidence, trace)
        if problem:
            result.problems.append(problem)
    result.measured = f"{plural(len(evidence.reference.norms), 'layer')}: at most {worst:.1e} from a plain loop"
    return result


def _undisturbed(evidence: Evidence, steps: list[int]) -> list[int]:
    """Those after which --lookahead does not average the statistics besides; the first is always among them."""
    every, total = evidence.config.optim.lookahead, evidence.config.optim.epochs * evidence.steps
    return [step for step in steps if not every or lookahead_decay(step + 1, every, total) is None]


def _movement(evidence: Evidence, trace: Trace, total: int, limit: float, result: Result) -> float:
    """The relative difference of what moved the running statistics in a step from the plain mean over its samples."""
    before, after = kept(trace, f"state-{total}"), kept(trace, f"state-{total + 1}")
    if not before or not after:
        return float("inf")
    step = evidence.reference.step(before, *divmod(total, evidence.steps))
    seen = {lane: step.sizes[lane] / sum(step.sizes) for lane in step.statistics}
    momentum = {name: module.momentum or 0.0 for name, module in evidence.reference.norms.items()}
    got, wanted = {}, {}
    for name in next(iter(step.statistics.values())):
        m = momentum[name.rpartition(".")[0]]
        got[name] = (after[name].double() - (1 - m) * before[name].double()) / m
        wanted[name] = sum((seen[lane] * step.statistics[lane][name] for lane in seen), torch.zeros(()))
    worst = max(relative({name: got[name]}, {name: wanted[name]}) for name in wanted)
    if worst > limit:
        shares = {lane: seen[lane] * flat(step.statistics[lane]) for lane in seen}
        factors, rest = blame.factors_of(shares, flat(got))
        why = blame.explain(factors, rest, step.sizes, evidence.config, trace.processes)
        result.problems.append(
            f"with {called(trace)} running statistics moved in step {total} towards other values than the mean over"
            f" all samples (relative difference {worst:.1e}): {why}"
        )
    return worst


def _other_buffers(evidence: Evidence, trace: Trace) -> str:
    """ "" or from which step on the statistics have other bits than with one process."""
    if not evidence.exact(trace):
        return ""
    mine, wanted = trace.by_step("state"), evidence.one.by_step("state")
    for total in sorted(mine.keys() & wanted.keys()):
        if mine[total]["weights"] != wanted[total]["weights"]:
            return ""  # then the statistics are of another network
        if mine[total]["buffers"] != wanted[total]["buffers"]:
            return f"with {called(trace)} the running statistics have other bits than with 1 before step {total}"
    return ""
