"""How fast a network could train at most on a device of a given arithmetic and memory speed, counted layer by layer.

    python benchmarks/roof.py [--model resnet50] [--side 224] [--batch 256] [--tflops 989] [--gigabytes 3350]

Computed from shapes alone: nothing is measured here. (The defaults are what NVIDIA states for an H100 SXM, dense
bfloat16, the arithmetic as in distcnn/gauge.py.) A kernel takes the longer of the time for its operations and the
time for its bytes; kernels run one after the other. Bytes are those that must cross the memory bus if a kernel reads
its inputs and writes its outputs once, with activations in 2 bytes; caches that hold a whole activation would beat
that, and small kernels do not reach it.

eager: convolutions, batch norms, activations and additions are kernels of their own. fused: activations and
additions cost nothing beside the kernel before them, as a compiler makes it. convolutions: batch norm costs nothing
either, as in hand-written kernels that normalise while they load.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from distcnn.gauge import TERA, peak_flops

Level = Literal["eager", "fused", "convolutions"]
LEVELS: tuple[Level, ...] = ("eager", "fused", "convolutions")
KEPT: dict[Level, tuple[str, ...]] = {
    "eager": ("product", "norm", "activation", "addition", "pooling"),
    "fused": ("product", "norm", "pooling"),
    "convolutions": ("product", "pooling"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a training step: what it computes and moves for the whole batch."""

    kind: str
    operations: float  # a multiplication and an addition are two
    bytes: float

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


def kernels_of(model: nn.Module, x_NCHW: torch.Tensor, width: int = 2) -> list[Kernel]:
    """The kernels of forward and backward, for activations and weights of `width` bytes. `x_NCHW` may be on meta."""
    found: list[Kernel] = []

    def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        found.extend(_kernels(module, inputs[0], output, width))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    model(x_NCHW)
    for hook in hooks:
        hook.remove()
    return found


def _kernels(module: nn.Module, x: torch.Tensor, y: torch.Tensor, width: int) -> Iterator[Kernel]:
    ins, outs = x.numel() * width, y.numel() * width
    if isinstance(module, nn.Conv2d | nn.Linear):
        weights = module.weight.numel() * width
        fan_in = module.weight[0].numel()
        operations = 2.0 * y.numel() * fan_in
        yield Kernel("product", operations, ins + weights + outs)
        yield Kernel("product", operations, ins + outs + weights)  # gradient of the weights
        if x.shape[1] > 3:
            yield Kernel("product", operations, outs + weights + ins)  # gradient of the input
    elif isinstance(module, nn.BatchNorm2d):
        yield Kernel("norm", 0, 2 * ins + outs)  # statistics, then the values
        yield Kernel("norm", 0, 2 * (ins + outs) + ins)
    elif isinstance(module, nn.ReLU | nn.GELU | nn.SiLU | nn.Tanh | nn.CELU):
        yield Kernel("activation", 0, ins + outs)
        yield Kernel("activation", 0, ins + 2 * outs)
    elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        yield Kernel("pooling", 0, ins + outs)
        yield Kernel("pooling", 0, ins + outs)
    elif type(module).__name__ in ("Bottleneck", "BasicBlock"):  # of torchvision: the sum at their ends
        yield Kernel("addition", 0, 3 * outs)
        yield Kernel("addition", 0, 3 * outs)


def images_per_second(
    kernels: list[Kernel], batch: int, operations_per_second: float, bytes_per_second: float, level: Level
) -> float:
    """The most that a device of these speeds can train."""
    used = [kernel for kernel in kernels if kernel.kind in KEPT[level]]
    return batch / sum(kernel.seconds(operations_per_second, bytes_per_second) for kernel in used)


def build(model: str, side: int, classes: int = 1000) -> nn.Module:
    """The network without memory behind its weights."""
    from distcnn.config import from_flat
    from distcnn.models import build_plain

    with torch.device("meta"):
        return build_plain(from_flat({"model": model}).model, classes, side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tflops", type=float, default=peak_flops("NVIDIA H100 80GB HBM3", "bf16") / TERA)
    parser.add_argument("--gigabytes", type=float, default=3350.0)
    asked = parser.parse_args()
    model = build(asked.model, asked.side)
    kernels = kernels_of(model, torch.empty(asked.batch, 3, asked.side, asked.side, device="meta"))
    operations, moved = sum(k.operations for k in kernels), sum(k.bytes for k in kernels)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{asked.model}, {asked.side} px, batch {asked.batch}: {parameters:,} parameters;"
        f" {operations / asked.batch / 1e9:.1f} GFLOP and {moved / asked.batch / 1e6:.0f} MB an image (eager, 2 bytes)"
    )
    for level in LEVELS:
        rate = images_per_second(kernels, asked.batch, asked.tflops * 1e12, asked.gigabytes * 1e9, level)
        print(f"{level:<14}{rate:>9,.0f} images/s at most, with {asked.tflops:g} TFLOP/s and {asked.gigabytes:g} GB/s")
    for kind in KEPT["eager"]:
        some = [k for k in kernels if k.kind == kind]
        seconds = sum(k.seconds(asked.tflops * 1e12, asked.gigabytes * 1e9) for k in some)
        moved = sum(k.bytes for k in some) / asked.batch / 1e6
        print(f"  {kind:<12}{1e6 * seconds / asked.batch:>8.1f} us an image, {moved:>6.0f} MB")


if __name__ == "__main__":
    main()
