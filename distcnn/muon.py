"""Optimizers beyond torch's: Muon and LAMB. Both can leave out a step on the device's own finding, as fused ones do.

`found_inf`, a scalar that is not 0 where the step must not be made, is what torch's loss scaling hands to optimizers
that say `_step_supports_amp_scaling` (torch.amp.GradScaler.step). Nobody waits for it: a step that is left out is
computed from zeros, with factors of 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UNIT_STEP = 9.6  # airbench94's rate of 0.24, where AdamW's is 0.025
ADAM_EPSILON, LAMB_EPSILON = 1e-8, 1e-6

Tensors = list[torch.Tensor]


def orthogonalised(rows_BRC: torch.Tensor) -> torch.Tensor:
    """(B, R, C) float32 with all singular values near 1 (0.7 to 1.2), and the same singular vectors.

    Newton-Schulz with the quintic of Jordan et al. ("Muon: an optimizer for hidden layers", 2024), five times. Each is
    a polynomial in X X^T times X; polynomials of one matrix commute, so all five are made of the small Gram matrix, and
    the large one is used twice instead of ten times.
    """
    a, b, c = QUINTIC
    wide = rows_BRC.shape[1] <= rows_BRC.shape[2]
    x = rows_BRC if wide else rows_BRC.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-20)  # no singular value above 1
    gram = x @ x.mT
    whole: torch.Tensor | None = None  # the product of the factors so far
    for iteration in range(ITERATIONS):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        whole = factor if whole is None else factor @ whole
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    assert whole is not None
    y: torch.Tensor = whole @ x
    return y if wide else y.mT


class _Skipping(torch.optim.Optimizer):
    """An optimizer whose step does nothing where `found_inf` is not 0."""

    _step_supports_amp_scaling = True

    def _go(self, device: torch.device) -> torch.Tensor:
        """Scalar float32 on the device: 1, or 0 where the step is to be left out."""
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("gradients must be unscaled before the step")
        found: torch.Tensor | None = getattr(self, "found_inf", None)
        if found is None:
            return torch.ones((), device=device)
        return 1.0 - found.to(device=device, dtype=torch.float32).clamp(max=1).reshape(())

    def _state(self, p: torch.Tensor, *names: str) -> list[torch.Tensor]:
        """The state's tensors of a parameter, zeros at first. "steps" is a scalar float32, the others like it."""
        state: dict[str, Any] = self.state[p]
        for name in names:
            if name not in state:
                counter = name == "steps"
                state[name] = torch.zeros((), device=p.device) if counter else torch.zeros_like(p)
        return [state[name] for name in names]


class Muon(_Skipping):
    """Muon for the groups with `orthogonal=True`, whose parameters have 4 dimensions, and AdamW for the others.

    The update of a filter bank, seen as a matrix of a row a filter, is its Nesterov momentum orthogonalised, times 0.2
    and the root of the longer side, which gives it the size of AdamW's updates: both take the same learning rate and
    weight decay (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982, 2025). Groups with `unit=True` are
    trained as airbench94_muon.py does it (Jordan, 2024): instead of decaying, a bank is scaled before each step so that
    the mean square length of its filters is 1, and the orthogonalised momentum is taken `UNIT_STEP` times the learning
    rate, whatever the bank's shape.
    """

    def __init__(self, groups: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["orthogonal"]:
                self._orthogonal_step(group, params)
            elif params:
                self._adamw_step(group, params)

    def _orthogonal_step(self, group: dict[str, Any], params: Tensors) -> None:
        go = self._go(params[0].device)
        alike: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for p in params:
            assert p.grad is not None
            gradient = torch.where(go > 0, p.grad, 0.0)
            (momentum,) = self._state(p, "momentum_buffer")
            momentum.lerp_(gradient, (1 - group["momentum"]) * go)
            ahead = gradient.lerp(momentum, group["momentum"])
            # O I k k -> O, k k I: in channels_last a view. The order of columns does not matter here.
            rows_RC = ahead.permute(0, 2, 3, 1).reshape(len(ahead), -1)
            alike[rows_RC.shape[0], rows_RC.shape[1]].append((p, rows_RC))
        for (rows, columns), members in alike.items():
            unit = group.get("unit", False)  # groups of older checkpoints do not say
            scale = (UNIT_STEP if unit else 0.2 * max(rows, columns) ** 0.5) * group["lr"] * go
            updates = orthogonalised(torch.stack([rows_RC.float() for _, rows_RC in members])) * scale
            for (p, _), update_RC in zip(members, updates, strict=True):
                outputs, inputs, height, width = p.shape
                if unit:
                    p.mul_(torch.where(go > 0, outputs**0.5 / torch.linalg.vector_norm(p).clamp(min=1e-20), 1.0))
                else:
                    p.mul_(1 - group["lr"] * group["weight_decay"] * go)
                p.sub_(update_RC.view(outputs, height, width, inputs).permute(0, 3, 1, 2))

    def _adamw_step(self, group: dict[str, Any], params: Tensors) -> None:
        states = [self._state(p, "exp_avg", "exp_avg_sq", "steps") for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state[0] for state in states],
            [state[1] for state in states],
            [],
            [state[2] for state in states],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=ADAM_EPSILON,
            maximize=False,
        )


class Lamb(_Skipping):
    """LAMB: AdamW whose step of each parameter is as long as a share `lr` of the parameter itself.

    You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020, algorithm 2.
    As timm does, parameters without weight decay take the plain step.
    """

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._group_step(group, params)

    def _group_step(self, group: dict[str, Any], params: Tensors) -> None:
        beta1, beta2 = group["betas"]
        go = self._go(params[0].device)
        gradients = [torch.where(go > 0, p.grad, 0.0) for p in params if p.grad is not None]
        states = [self._state(p, "exp_avg", "exp_avg_sq", "steps") for p in params]
        means, squares, counts = ([state[place] for state in states] for place in range(3))
        _follow(means, gradients, (1 - beta1) * go)
        _follow(squares, torch._foreach_mul(gradients, gradients), (1 - beta2) * go)
        torch._foreach_add_(counts, [go] * len(counts))  # a scalar tensor by itself would be read
        steps = counts[0].clamp(min=1).to(torch.float64)  # the first steps may all have been left out
        roots = torch._foreach_sqrt(torch._foreach_div(squares, (1 - beta2**steps).float()))
        torch._foreach_add_(roots, LAMB_EPSILON)
        updates = torch._foreach_div(means, (1 - beta1**steps).float())
        torch._foreach_div_(updates, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            norms = zip(torch._foreach_norm(params), torch._foreach_norm(updates), strict=True)
            torch._foreach_mul_(updates, [_trust(weight, update) for weight, update in norms])
        torch._foreach_mul_(updates, group["lr"] * go)
        torch._foreach_sub_(params, updates)


def _follow(averages: Tensors, values: Tensors | tuple[torch.Tensor, ...], share: torch.Tensor) -> None:
    """Move each average by `share`, a scalar on the device, of its way to the value."""
    apart = torch._foreach_sub(values, averages)
    torch._foreach_mul_(apart, share)
    torch._foreach_add_(averages, apart)


def _trust(weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The ratio of the two norms; 1 where one of them is 0."""
    return torch.where((weight > 0) & (update > 0), weight / update.clamp(min=1e-30), 1.0)
