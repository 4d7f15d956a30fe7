"""Networks made for speed: the most accuracy for a second of training on small images.

resnet9: Page, "How to train your ResNet", 2018 (the DAWNBench winner of its time on CIFAR-10).
airbench: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, 2024.

N batch, C channel, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from distcnn.config import ModelConfig
from distcnn.errors import UserError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
RESNET9_CHANNELS = (64, 128, 256, 512)
AIRBENCH_CHANNELS = (64, 256, 256)
SMALLEST_AIRBENCH = 16  # pixels: three poolings of what is left of them
WHITENED_MOST = 24  # patterns that a whitening layer keeps


@dataclass(frozen=True)
class Rate:
    """How a parameter is trained: a factor of its learning rate, and the share of the run's steps in which it learns.

    unit: filters whose length does not matter, since batch norm follows; Muon keeps them at a mean square of 1.
    """

    factor: float = 1.0
    share: float = 1.0
    unit: bool = False


def first_stride(size: int) -> int:
    """By how much the first layer reduces the side, so that about 32 px are left: 1, 2 (from 48 px) or 4 (from 96)."""
    return 1 if size < 48 else 2 if size < 96 else 4


class ConvNorm(nn.Sequential):
    """3x3 convolution, max pooling where `halve`, batch norm, activation.

    Pooling before norm and activation, as Page found: the same accuracy, and a quarter of their work.
    """

    def __init__(self, inputs: int, outputs: int, activation: type[nn.Module], halve: bool = False) -> None:
        pool = [nn.MaxPool2d(2, ceil_mode=True)] if halve else []
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        super().__init__(conv, *pool, nn.BatchNorm2d(outputs), activation())


class Residual(nn.Module):
    """x + f(x), where f is two convolutions with batch norm and activation."""

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ConvNorm(channels, channels, activation) for _ in range(2)))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> the same shape."""
        y_NCHW: torch.Tensor = x_NCHW + self.layers(x_NCHW)
        return y_NCHW


class ResNet9(nn.Module):
    """Eight convolutions, two residual blocks, global max pooling, one linear layer times 1/8.

    Takes (n, 3, H, W) float32 of any side, gives (n, classes) logits. Built for about `size` px: from 48 px on the
    first layer has a stride, so that the layers behind it see about 32 px.
    """

    def __init__(self, config: ModelConfig, classes: int, size: int) -> None:
        super().__init__()
        first, second, third, fourth = _channels(config, RESNET9_CHANNELS)
        activation, stride = ACTIVATIONS[config.activation], first_stride(size)
        kernel = 2 * stride if stride > 1 else 3  # neighbouring windows overlap by half
        stem = nn.Conv2d(3, first, kernel, stride, padding=(kernel - stride + 1) // 2, bias=False)
        self.features = nn.Sequential(
            nn.Sequential(stem, nn.BatchNorm2d(first), activation()),
            ConvNorm(first, second, activation, halve=True),
            Residual(second, activation),
            ConvNorm(second, third, activation, halve=True),
            ConvNorm(third, fourth, activation, halve=True),
            Residual(fourth, activation),
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(fourth, classes, bias=False)

    def forward(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, classes)."""
        pooled_NC = self.features(image_NCHW).amax((2, 3))
        logits_NK: torch.Tensor = self.head(self.dropout(pooled_NC)) * 0.125
        return logits_NK


def bias_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with a scale of 1 that stays, and running statistics that move by 0.4 a step."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class Group(nn.Module):
    """Two 3x3 convolutions with GELU, pooling after the first. Filters begin as the identity, as far as they can."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = bias_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = bias_norm(outputs)
        self.activation = nn.GELU()
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> (n, outputs, H // 2, W // 2)."""
        x_NCHW = self.activation(self.norm1(self.pool(self.conv1(x_NCHW))))
        y_NCHW: torch.Tensor = self.activation(self.norm2(self.conv2(x_NCHW)))
        return y_NCHW


class Airbench(nn.Module):
    """A first layer that whitens patches and is not learnt (but for its bias), three groups, a linear layer times 1/C.

    Takes (n, 3, H, W) float32 from 16 px on, gives (n, classes) logits. `whiten.weight` is random until it is set from
    patches of training images (whitening.py); without that the network learns less. From 48 px on the patches are
    larger and lie apart, and the most frequent patterns are kept.
    """

    def __init__(self, config: ModelConfig, classes: int, size: int) -> None:
        super().__init__()
        if size < SMALLEST_AIRBENCH:
            raise UserError(f"--model airbench needs {SMALLEST_AIRBENCH} px or more, these are {size}: --model resnet9")
        widths = _channels(config, AIRBENCH_CHANNELS)
        stride = first_stride(size)
        patterns = min(3 * (2 * stride) ** 2, WHITENED_MOST)
        self.whiten = nn.Conv2d(3, 2 * patterns, 2 * stride, stride)
        self.whiten.weight.requires_grad_(False)
        sizes = zip((2 * patterns, *widths), widths, strict=False)
        self.layers = nn.Sequential(nn.GELU(), *(Group(inputs, outputs) for inputs, outputs in sizes))
        self.head = nn.Linear(widths[-1], classes, bias=False)
        self.head.weight.data.div_(self.head.weight.data.std())

    def forward(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, classes)."""
        pooled_NC = self.layers(self.whiten(image_NCHW)).amax((2, 3))
        logits_NK: torch.Tensor = self.head(pooled_NC) / pooled_NC.shape[1]
        return logits_NK

    def rates(self) -> dict[str, Rate]:
        """Of some parameters by name: the whitening layer's bias learns in the first three of eight epochs."""
        filters = {f"layers.{name}": Rate(unit=True) for name, p in self.layers.named_parameters() if p.ndim == 4}
        return {"whiten.bias": Rate(share=3 / 8), **filters}


def _channels(config: ModelConfig, default: tuple[int, ...]) -> tuple[int, ...]:
    """--channels where it is as many as the network has groups, else the network's own. Raises UserError."""
    if config.channels == ModelConfig().channels:
        return default
    if len(config.channels) != len(default):
        given = " ".join(map(str, config.channels))
        raise UserError(f"--channels {given}: --model {config.model} has {len(default)} groups of layers")
    return config.channels


NETWORKS: dict[str, Callable[[ModelConfig, int, int], nn.Module]] = {"resnet9": ResNet9, "airbench": Airbench}
