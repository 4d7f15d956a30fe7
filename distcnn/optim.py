"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distcnn.config import OptimConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW (Loshchilov & Hutter, ICLR 2019). No decay on biases and norms (ndim < 2).

    The fused kernels, since they can leave out a step on the device's own finding: see `skip_unless`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up over `warmup` steps from peak/warmup, then down to 0 at `total` steps."""

    peak: float
    total: int
    warmup: int
    kind: str

    def __call__(self, step: int) -> float:
        """The learning rate of the step with this number, counted from 0 over the whole run."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.total - self.warmup, 1)
        if self.kind == "cosine":
            return self.peak * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.peak * (max(1 - done, 0.0) if self.kind == "linear" else 1.0)


def build_schedule(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """The schedule of a run of `steps_per_epoch` steps an epoch."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    return Schedule(config.lr, config.epochs * steps_per_epoch, warmup, config.schedule)


def skip_unless(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Make the next step do nothing unless the scalar `finite` is true, without waiting for it.

    `found_inf` is what torch's loss scaling hands to fused optimizers (torch.amp.GradScaler.step).
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    inner.found_inf = (~finite).to(torch.float32).reshape(())


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
