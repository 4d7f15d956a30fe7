"""A forward and backward pass of one tile looked at layer by layer: where does what is not finite come from?

N samples of the tile, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distcnn.augment import Targets
from distcnn.losses import Loss, loss_sum


@dataclass(frozen=True)
class Layer:
    """What one call of a layer gave. Norms are L2; a `bad` number counts values that are NaN or infinite."""

    name: str
    kind: str
    output_norm: float
    output_max: float  # the largest absolute value
    bad_outputs: int
    weight_norm: float
    bad_weights: int
    gradient_norm: float  # of its own parameters
    bad_gradients: int


@dataclass(frozen=True)
class Examination:
    """A tile's share of the step's mean loss, and its layers in the order in which they were called."""

    loss: float
    layers: tuple[Layer, ...]

    @property
    def origin(self) -> str:
        """Where the first value that is not finite comes from, "" if all is finite.

        In the forward pass the first layer, whose weights may have been so before; in the backward pass the last one.
        """
        for layer in self.layers:
            if layer.bad_outputs:
                what = "its weights are not finite" if layer.bad_weights else "its output is not finite"
                return f"{layer.name} ({layer.kind}): {what}"
        if not math.isfinite(self.loss):
            return "the loss: all layers are finite"
        for layer in reversed(self.layers):
            if layer.bad_gradients:
                return f"{layer.name} ({layer.kind}): the gradient of its weights is not finite"
        return ""


def examine(
    model: nn.Module,
    x_NCHW: torch.Tensor,
    targets: Targets,
    criterion: Loss,
    samples: int,
    autocast: torch.autocast,
) -> Examination:
    """Forward and backward of a tile by `model`, whose gradients are added to. `samples`: of the whole step."""
    before = {name: _copy(p.grad) for name, p in model.named_parameters()}
    calls: list[tuple[str, nn.Module, tuple[float, float, int]]] = []
    with _watched(model, calls), autocast:
        logits_NK = model(x_NCHW)
    loss = loss_sum(logits_NK, targets, criterion) / samples
    loss.backward()  # type: ignore[no-untyped-call]
    layers = tuple(_layer(name, module, outputs, before) for name, module, outputs in calls)
    return Examination(loss.item(), layers)


@contextmanager
def _watched(model: nn.Module, calls: list[tuple[str, nn.Module, tuple[float, float, int]]]) -> Iterator[None]:
    """Notes what every call of a layer without children returns."""

    def note(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            calls.append((name, module, _facts(output.detach())))

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: note(name, module, output))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(
    name: str, module: nn.Module, outputs: tuple[float, float, int], before: dict[str, torch.Tensor | None]
) -> Layer:
    weights = list(module.named_parameters(recurse=False))
    gradients = []
    for own, weight in weights:
        if weight.grad is not None:
            earlier = before.get(f"{name}.{own}" if name else own)
            gradients.append(weight.grad if earlier is None else weight.grad - earlier)
    weight_norm, _, bad_weights = _facts(*(weight.detach() for _, weight in weights))
    gradient_norm, _, bad_gradients = _facts(*gradients)
    return Layer(name, type(module).__name__, *outputs, weight_norm, bad_weights, gradient_norm, bad_gradients)


def _facts(*tensors: torch.Tensor) -> tuple[float, float, int]:
    """(L2 norm, largest absolute value, how many are not finite) of the values of some tensors."""
    if not any(tensor.numel() for tensor in tensors):
        return 0.0, 0.0, 0
    values = torch.cat([tensor.flatten().to(torch.float64) for tensor in tensors])
    return values.norm().item(), values.abs().max().item(), int((~values.isfinite()).sum())


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()
