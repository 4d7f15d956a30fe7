"""Averaged weights: beside the trained ones, or ones that these are set back to.

Ema: an exponential moving average over the steps (Polyak & Juditsky 1992; Tarvainen & Valpola 2017).
Lookahead: Zhang et al., "Lookahead optimizer: k steps forward, 1 step back", arXiv 1907.08610, 2019, with the rising
decay of Jordan's airbench94 (arXiv 2404.00498, 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import nn

LOOKAHEAD_DECAY = 0.95  # a step, at the end of a run


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


def lookahead_decay(step: int, every: int, total: int) -> float | None:
    """By how much the slow weights stay where they are after `step` of `total` steps (from 1); None: no turn of theirs.

    Their turn is every `every` steps and after the last one. The decay is 0.95 a step at the end of the run, and before
    that times the cube of the share of the run that is done: early on the slow weights are almost the trained ones.
    """
    if step % every and step != total:
        return None
    return float(LOOKAHEAD_DECAY**every * (step / total) ** 3)


def first_share(every: int, total: int) -> float:
    """What share of the weights that a run of `total` steps ends with is that of those it began with."""
    turns = {*range(every, total + 1, every), total}
    return math.prod(lookahead_decay(step, every, total) or 0.0 for step in turns)


class Lookahead:
    """Slow weights: at their turn they move by 1 - decay towards the trained ones, which then become the slow ones.

    The averages of batch norm are among them, as in airbench94; the optimizer's momenta go on. All is a function of the
    step's number, which is why a step that was left out changes nothing in when the next turn is.
    """

    def __init__(self, model: nn.Module, every: int, total: int) -> None:
        self.every, self.total = every, total
        self.slow = {name: tensor.clone() for name, tensor in _floats(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step number `step` (from 1) of the run: at their turn, move the slow weights and set `model` back."""
        decay = lookahead_decay(step, self.every, self.total)
        if decay is None:
            return
        slow, fast = list(self.slow.values()), list(_floats(model).values())
        torch._foreach_lerp_(slow, fast, 1 - decay)
        torch._foreach_copy_(fast, slow)

    @torch.no_grad()
    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Go on from the slow weights of a checkpoint."""
        for name, tensor in self.slow.items():
            tensor.copy_(saved[name])


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own weights and averages by name: what it saves, without its counters."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
