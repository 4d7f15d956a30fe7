"""Averaged weights: an exponential moving average over the steps (Polyak & Juditsky 1992; Tarvainen & Valpola 2017)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """A copy of the model that follows it. Its parameters move by 1 - decay a step; its buffers are the model's."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow `model` by one step."""
        mine: list[torch.Tensor] = list(self.model.parameters())
        theirs: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for copied, source in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(source)
