"""Batch norm by tile: statistics that depend on the config and not on the number of processes.

Each tile is normalised by its own statistics, as a process of plain DDP normalises its batch. What is new is the
running mean and variance: a module only notes the tile's statistics, and once per step the sample-weighted mean over
all tiles of all processes moves the running values. So they are the same in every process at every step, and the same
from any number of processes (with the tree reduction, to the bit).

`sync` takes the statistics over the tiles that all processes compute at the same time (torch's SyncBatchNorm does the
same): larger batches for the statistics, but then they depend on the number of processes.

Weights, buffers and names are those of torch.nn.BatchNorm2d: checkpoints load into plain torchvision models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distcnn.errors import UserError


class TileBatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d that notes the statistics of the last tile instead of moving the running ones."""

    tile_mean: torch.Tensor
    tile_var: torch.Tensor

    def prepare(self) -> None:
        """Make room for the statistics; called once, when a plain module has been turned into this class."""
        self.register_buffer("tile_mean", torch.zeros(self.num_features), persistent=False)
        self.register_buffer("tile_var", torch.zeros(self.num_features), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> the same shape. One value per channel (n H W = 1) has variance 0: the output is the bias."""
        if not self.training:
            return super().forward(input)
        if input.numel() == input.shape[1]:
            self.tile_mean.copy_(input.detach().flatten())
            self.tile_var.zero_()
            scaled = input * 0 if self.weight is None else input * 0 * self.weight[:, None, None]
            return scaled if self.bias is None else scaled + self.bias[:, None, None]
        # With momentum 1 the "running" values become the tile's mean and unbiased variance.
        return nn.functional.batch_norm(
            input, self.tile_mean, self.tile_var, self.weight, self.bias, True, 1.0, self.eps
        )


class SyncBatchNorm2d(TileBatchNorm2d):
    """Normalises by the statistics of the tiles that all processes are computing, weighted by their samples."""

    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]  # differentiable
    counts: bool  # false while a blank tile stands in for none

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> the same shape. Every rank must call it equally often."""
        if not self.training:
            return nn.BatchNorm2d.forward(self, input)
        x = input.to(torch.float64) if self.counts else input.to(torch.float64) * 0
        number = x.new_full((1,), float(input.numel() // input.shape[1]) * self.counts)
        sums = self.sum_over_ranks(torch.cat([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3)), number]))
        total, squares, n = sums[: self.num_features], sums[self.num_features : -1], sums[-1].detach().clamp(min=1)
        mean = total / n
        var = (squares / n - mean * mean).clamp(min=0)
        self.tile_mean.copy_(mean.detach())
        self.tile_var.copy_((var * n / (n - 1).clamp(min=1)).detach())
        scale, shift = torch.rsqrt(var + self.eps), -mean * torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return input * scale.to(input.dtype)[:, None, None] + shift.to(input.dtype)[:, None, None]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d that always uses its running statistics, for fine-tuning."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> the same shape."""
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class _Activated(nn.BatchNorm2d):
    """Batch norm and the activation behind it in one layer, as timm builds them (BatchNormAct2d)."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> the same shape."""
        output: torch.Tensor = self.act(self.drop(super().forward(input)))
        return output


class ActivatedTileBatchNorm2d(_Activated, TileBatchNorm2d):
    """A TileBatchNorm2d with its activation."""


class ActivatedSyncBatchNorm2d(_Activated, SyncBatchNorm2d):
    """A SyncBatchNorm2d with its activation."""


class ActivatedFrozenBatchNorm2d(_Activated, FrozenBatchNorm2d):
    """A FrozenBatchNorm2d with its activation."""


KINDS: dict[str, type[nn.BatchNorm2d]] = {
    "tile": TileBatchNorm2d,
    "sync": SyncBatchNorm2d,
    "frozen": FrozenBatchNorm2d,
}
ACTIVATED_KINDS: dict[str, type[nn.BatchNorm2d]] = {
    "tile": ActivatedTileBatchNorm2d,
    "sync": ActivatedSyncBatchNorm2d,
    "frozen": ActivatedFrozenBatchNorm2d,
}
_CONVERTED = (TileBatchNorm2d, FrozenBatchNorm2d)


def convert(
    model: nn.Module, kind: str, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
) -> nn.Module:
    """Turn every BatchNorm2d of `model` into the tile, sync or frozen kind, in place: same tensors, same names.

    `sum_over_ranks` is what sync uses: a differentiable sum of a vector over the processes. What has been converted
    stays as it is. Raises UserError for a kind of batch norm whose statistics would depend on the processes.
    """
    for name, module in model.named_modules():
        kinds = KINDS if type(module) is nn.BatchNorm2d else ACTIVATED_KINDS
        if type(module) is nn.BatchNorm2d or type(module).__name__ == "BatchNormAct2d":
            if not module.track_running_stats or module.momentum is None:
                raise ValueError(
                    "batch norm without running statistics, or with a cumulative average, is not supported"
                )
            module.__class__ = kinds[kind]
            if isinstance(module, TileBatchNorm2d):
                module.prepare()
            if isinstance(module, SyncBatchNorm2d):
                module.sum_over_ranks, module.counts = sum_over_ranks, True
        elif isinstance(module, _BatchNorm) and not isinstance(module, _CONVERTED):
            raise UserError(f"the network's layer {name} is a {type(module).__name__}, which distcnn does not train")
    return model


class TileStatistics:
    """The statistics of all tile batch norms of a model, as one vector that can be summed over tiles and processes."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [m for m in model.modules() if isinstance(m, TileBatchNorm2d)]
        self.size = 2 * sum(m.num_features for m in self._modules)
        self._device = next((p.device for p in model.parameters()), None)

    def begin(self, samples: int) -> None:
        """Say how many samples the next tile has: one that stands in for none (0) counts for nothing."""
        for module in self._modules:
            if isinstance(module, SyncBatchNorm2d):
                module.counts = samples > 0

    def collect(self, samples: int) -> torch.Tensor:
        """(size,) float64: means and variances of the last tile, times its number of samples."""
        if not self._modules:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        notes = [m.tile_mean for m in self._modules] + [m.tile_var for m in self._modules]
        collected = torch.cat(notes).to(torch.float64).mul_(samples)
        torch._foreach_zero_(notes)  # momentum 1 takes what was noted before 0 times, but 0 times NaN is NaN
        return collected

    @torch.no_grad()
    def apply(self, totals: torch.Tensor, samples: int, finite: torch.Tensor) -> None:
        """Move the running values by the sums over the step's tiles, (size,) float64, of `samples` samples in all.

        Nothing moves unless the scalar `finite` is true: the step is left out.
        """
        if not self._modules:
            return
        sizes = [m.num_features for m in self._modules] * 2
        means_and_vars = torch.split(totals / samples, sizes)
        half = len(self._modules)
        for module, mean, var in zip(self._modules, means_and_vars[:half], means_and_vars[half:], strict=True):
            assert module.running_mean is not None and module.running_var is not None
            assert module.num_batches_tracked is not None and module.momentum is not None
            for running, new in ((module.running_mean, mean), (module.running_var, var)):
                running.lerp_(torch.where(finite, new.to(running.dtype), running), module.momentum)
            module.num_batches_tracked += 1
