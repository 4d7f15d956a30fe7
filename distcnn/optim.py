"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distcnn.config import OptimConfig
from distcnn.fastnets import Rate
from distcnn.models import head_of
from distcnn.muon import Lamb, Muon

RISE, END = 1 / 25, 1 / 250_000  # one-cycle: where it begins and ends, as shares of the peak


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, AdamW (Loshchilov & Hutter, ICLR 2019), or muon.py's. No decay where ndim < 2.

    Fused kernels where torch has them, since they can leave out a step on the device's own finding: see `skip_unless`.
    Groups have a `rate_factor`, and a `rate_share` of the run after which they rest: see `set_learning_rate`.
    """
    groups = list(_groups(config, model))
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    if config.optimizer == "muon":
        return Muon(groups, config.lr, config.momentum)
    if config.optimizer == "lamb":
        return Lamb(groups, config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _groups(config: OptimConfig, model: nn.Module) -> Iterator[dict[str, Any]]:
    """The trained parameters by what differs: weight decay, learning rate, whether Muon takes them."""
    special: dict[str, Rate] = getattr(model, "rates", dict)()
    behind = blocks_behind(model) if config.layer_decay < 1 else {}
    filters = _filters(model) if config.optimizer == "muon" else frozenset()
    alike: dict[tuple[bool, bool, float, float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = special.get(name, Rate())
            factor = rate.factor * config.layer_decay ** behind.get(name, 0)
            decay = config.weight_decay if p.ndim > 1 else 0.0
            unit = rate.unit and name in filters
            alike.setdefault((name in filters, unit, decay, factor, rate.share), []).append(p)
    for (orthogonal, unit, decay, factor, share), params in sorted(
        alike.items(), key=lambda item: item[0], reverse=True
    ):
        group = {"params": params, "weight_decay": decay, "rate_factor": factor, "rate_share": share}
        yield group | {"orthogonal": True, "unit": unit} if orthogonal else group


def _filters(model: nn.Module) -> frozenset[str]:
    """Names of the weights that Muon takes: of convolutions that are not grouped, but for one that is the head."""
    head = head_of(model)
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and name != head
    )


def blocks_behind(model: nn.Module) -> dict[str, int]:
    """For each parameter how many blocks come after its own: 0 for those of the last layer.

    A block is what the first two parts of a name say, such as layer1.0 or features.3; one of biases and norms alone
    belongs to the block before it.
    """
    blocks: list[str] = []
    number: dict[str, int] = {}
    for name, p in model.named_parameters():
        block = ".".join(name.split(".")[:-1][:2])
        if block not in blocks and (p.ndim > 1 or not blocks):
            blocks.append(block)
        number[name] = blocks.index(block) if block in blocks else len(blocks) - 1
    return {name: len(blocks) - 1 - place for name, place in number.items()}


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a warm-up over `warmup` steps from peak/warmup, then what `kind` says until `total` steps.

    cosine and linear fall to 0; constant stays; step is a tenth after each third of all steps. one-cycle rises in a
    cosine from peak/25 and falls in one to peak/250,000 (Smith & Topin, "Super-convergence", 2017, in the form and with
    the numbers of torch's OneCycleLR).
    """

    peak: float
    total: int
    warmup: int
    kind: str

    def __call__(self, step: int) -> float:
        """The learning rate of the step with this number, counted from 0 over the whole run."""
        if step < self.warmup and self.kind == "one-cycle":
            return self.peak * _cosine(RISE, 1.0, step / self.warmup)
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.total - self.warmup, 1)
        if self.kind == "one-cycle":
            return self.peak * _cosine(1.0, END, min(done, 1.0))
        if self.kind == "cosine":
            return self.peak * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        if self.kind == "step":
            return self.peak * 0.1 ** (min(3 * step // max(self.total, 1), 2))
        return self.peak * (max(1 - done, 0.0) if self.kind == "linear" else 1.0)

    def done(self, step: int) -> float:
        """The share of the run's steps that come before this one."""
        return step / max(self.total, 1)


def _cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def build_schedule(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """The schedule of a run of `steps_per_epoch` steps an epoch."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    return Schedule(config.lr, config.epochs * steps_per_epoch, warmup, config.schedule)


def state_values(config: OptimConfig, model: nn.Module) -> int:
    """How many numbers the optimizer keeps for the trained parameters, besides counts."""
    of_filters = {"sgd": int(config.momentum > 0), "muon": 1}.get(config.optimizer, 2)
    of_others = of_filters if config.optimizer == "sgd" else 2
    filters = _filters(model) if config.optimizer == "muon" else frozenset()
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return sum(number * (of_filters if name in filters else of_others) for name, number in trained)


def skip_unless(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Make the next step do nothing unless the scalar `finite` is true, without waiting for it.

    `found_inf` is what torch's loss scaling hands to fused optimizers (torch.amp.GradScaler.step).
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    inner.found_inf = (~finite).to(torch.float32).reshape(())


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, done: float = 0.0) -> None:
    """Set the rate of every group: times its factor, or 0 where the share of the run that is `done` is beyond its own.

    Groups of older checkpoints have neither.
    """
    for group in optimizer.param_groups:
        resting = done >= group.get("rate_share", 1.0)
        group["lr"] = 0.0 if resting else lr * group.get("rate_factor", 1.0)
