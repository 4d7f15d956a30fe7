"""The CNNs: name -> module. Everything comes out in channels_last with batch norm by tile."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from distcnn.batchnorm import convert
from distcnn.config import ModelConfig
from distcnn.errors import UserError, nearest

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
SMALL_STEM_BELOW = 64  # pixels


class SimpleCNN(nn.Module):
    """The CNN of the tutorials: blocks of convolution, norm, activation and pooling, then one or two linear layers.

    Takes (n, 3, size, size) float32, gives (n, classes) logits. Each block halves the side while it is above 1
    (of an odd side pooling leaves out the last row; a stride does not).
    """

    def __init__(self, config: ModelConfig, classes: int, size: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs, side = 3, size
        for outputs in config.channels:
            blocks.append(_block(config, inputs, outputs, halve=side > 1))
            inputs, side = outputs, -(-side // 2) if config.pooling == "stride" else max(side // 2, 1)
        self.features = nn.Sequential(*blocks)
        flat = inputs * side * side
        head: list[nn.Module] = [nn.Flatten()]
        if config.hidden:
            head += [nn.Linear(flat, config.hidden), ACTIVATIONS[config.activation]()]
            flat = config.hidden
        if config.dropout:
            head.append(nn.Dropout(config.dropout))
        self.head = nn.Sequential(*head, nn.Linear(flat, classes))

    def forward(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, classes)."""
        logits_NK: torch.Tensor = self.head(self.features(image_NCHW))
        return logits_NK


def _block(config: ModelConfig, inputs: int, outputs: int, halve: bool) -> nn.Sequential:
    stride = 2 if halve and config.pooling == "stride" else 1
    normed = config.norm == "batch"
    k = config.kernel_size
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, k, stride, padding=k // 2, bias=not normed)]
    if normed:
        layers.append(nn.BatchNorm2d(outputs))
    layers.append(ACTIVATIONS[config.activation]())
    if halve and config.pooling != "stride":
        layers.append(nn.MaxPool2d(2) if config.pooling == "max" else nn.AvgPool2d(2))
    return nn.Sequential(*layers)


def build_model(
    config: ModelConfig,
    classes: int,
    size: int,
    seed: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> nn.Module:
    """The model of a config for `classes` classes and (n, 3, size, size) inputs, initialised by `seed` alone.

    `sum_over_ranks`, a differentiable sum over the processes, is what `--batch-norm sync` needs. Raises UserError for
    a name that is not known, and for a network whose input is too small for it.
    """
    torch.manual_seed(seed)
    model = build_plain(config, classes, size)
    convert(model, config.batch_norm, sum_over_ranks)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def build_plain(config: ModelConfig, classes: int, size: int) -> nn.Module:
    """The same network with torch's own batch norm, initialised by torch's generator as it stands."""
    if config.model == "cnn":
        return SimpleCNN(config, classes, size)
    return _torchvision_model(config, classes, size)


def torchvision_models() -> ModuleType:
    """torchvision.models. Raises UserError if torchvision does not match torch and fails at import."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UserError(
            f"torchvision {importlib.metadata.version('torchvision')} does not match torch {torch.__version__}"
            f" ({str(error).splitlines()[0]}): install both from one place, with 'uv sync --reinstall' in this folder"
            " or 'pip install --force-reinstall torch torchvision'"
        ) from error
    return models  # type: ignore[no-any-return]


def _torchvision_model(config: ModelConfig, classes: int, size: int) -> nn.Module:
    models = torchvision_models()
    names = [n for n in models.list_models(models) if n not in ("googlenet", "inception_v3")]
    if config.model not in names:
        raise UserError(f"--model {config.model}: not known{nearest(config.model, ['cnn', *names])}")
    try:
        model: nn.Module = models.get_model(config.model, weights=None, num_classes=classes)
    except ValueError as error:
        raise UserError(f"--model {config.model} cannot be built: {error}") from error
    small = config.stem == "small" or (config.stem == "auto" and size < SMALL_STEM_BELOW)
    if isinstance(model, models.ResNet) and small:
        # He et al. 2015, section 4.2: on 32 px the first layer is 3x3 with stride 1 and there is no pooling.
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif config.stem == "small":
        raise UserError(f"--stem small is for ResNets, not for {config.model}: leave it out")
    return model
