"""The CNNs: name -> module. Everything comes out in channels_last with batch norm by tile."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn
from torch.nn.functional import conv2d

from distcnn.batchnorm import convert
from distcnn.config import ModelConfig
from distcnn.errors import UserError, nearest
from distcnn.fastnets import ACTIVATIONS, NETWORKS

SMALL_STEM_BELOW = 64  # pixels
TIMM = "timm:"
BLURRED_FROM = 16  # input channels of a convolution: the image itself is not blurred


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
    if config.freeze == "backbone":
        freeze_backbone(model)
    convert(model, config.batch_norm, sum_over_ranks)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def build_plain(config: ModelConfig, classes: int, size: int) -> nn.Module:
    """The same network with torch's own batch norm, initialised by torch's generator as it stands."""
    if config.model == "cnn":
        model: nn.Module = SimpleCNN(config, classes, size)
    elif config.model in NETWORKS:
        model = NETWORKS[config.model](config, classes, size)
    elif config.model.startswith(TIMM):
        model = _timm_model(config, classes)
    else:
        model = _torchvision_model(config, classes, size)
    return blur(model) if config.blur_pool else model


def head_of(model: nn.Module) -> str:
    """The name of the layer that gives the logits: the last linear layer or convolution."""
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return names[-1]


def freeze_backbone(model: nn.Module) -> None:
    """Let the last layer alone learn; batch norm before it uses its running statistics, which stay."""
    head = model.get_submodule(head_of(model))
    own = {id(parameter) for parameter in head.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)
    convert(model, "frozen")


class BlurredConv2d(nn.Conv2d):
    """A convolution with a stride whose input is blurred first, so that a shifted image changes less.

    The filter is 1 2 1 in both directions over 16 (Zhang, "Making convolutional networks shift-invariant again", ICML
    2019), before the convolution as in FFCV's ImageNet recipes. Weights and names are those of the plain layer.
    """

    blur: torch.Tensor  # (1, 1, 3, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) -> what the convolution makes of it."""
        channels = input.shape[1]
        blurred = conv2d(input, self.blur.to(input.dtype).expand(channels, 1, 3, 3), padding=1, groups=channels)
        return super().forward(blurred)


def blur(model: nn.Module) -> nn.Module:
    """Turn every Conv2d with a stride, but those that see the image, into a BlurredConv2d, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and max(module.stride) > 1 and module.in_channels >= BLURRED_FROM:
            module.__class__ = BlurredConv2d
            row = torch.tensor([1.0, 2.0, 1.0], device=module.weight.device) / 4
            module.register_buffer("blur", torch.outer(row, row)[None, None], persistent=False)
    return model


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
        raise UserError(f"--model {config.model}: not known{nearest(config.model, ['cnn', *NETWORKS, *names])}")
    # Residual blocks begin as the identity: Goyal et al., "Accurate, large minibatch SGD", 2017, section 5.1.
    more = {"zero_init_residual": True} if config.model.startswith(("resnet", "resnext", "wide_resnet")) else {}
    try:
        model: nn.Module = models.get_model(config.model, weights=None, num_classes=classes, **more)
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


def _timm_model(config: ModelConfig, classes: int) -> nn.Module:
    """A network of timm, the optional package, without weights."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--model {config.model} needs timm: pip install timm") from error
    name = config.model.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UserError(f"--model {config.model}: timm does not know it{nearest(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return model
