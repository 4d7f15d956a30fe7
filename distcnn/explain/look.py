"""What a network does with one image: its first filters, the maps by depth, and what speaks for a class (Grad-CAM).

N images (one), C channels, H W positions of a map, S pixels of a side, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distcnn.classifier import Classifier
from distcnn.data.decode import Pixels
from distcnn.data.loader import Loader, TileRequest
from distcnn.data.readers import FileReader
from distcnn.errors import DataError, UserError, nearest

TOP = 5
LEAST_SIDE = 4  # of the maps that Grad-CAM takes where nothing else is asked for: 2x2 shows no place
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Identity, nn.Dropout)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Maps:
    """What a layer gives for the image: (C, H, W), H = W."""

    layer: str
    values_CHW: Floats

    @property
    def strongest(self) -> list[int]:
        """The channels, the one with the largest mean absolute value first."""
        order = np.argsort(-np.abs(self.values_CHW).mean((1, 2)), kind="stable")
        return [int(channel) for channel in order]


@dataclass(frozen=True)
class Look:
    """All that the picture shows. `heat_HW`: 0 to 1, or all 0 where nothing in the layer speaks for the class."""

    pixels_SSC: Pixels  # (S, S, 3) uint8, as the network is given them, before they are normalised
    top: list[tuple[str, float]]  # the most probable classes
    wanted: str  # the class that the heat speaks for
    probability: float  # its
    layer: str  # of the heat
    heat_HW: Floats
    filters_OIHW: Floats  # of the first convolution
    first: str  # its name
    gray: bool  # the network was trained on gray images: a filter's channels only ever act together
    stages: list[Maps]  # by depth


def look(model: Classifier, image: Path, wanted: str = "", layer: str = "") -> Look:
    """Run `image` through the network; `wanted`: a class, "" for the most probable one; `layer`: "" to choose.

    Grad-CAM: the maps of a layer, each weighted by the mean gradient of the class's logit, summed, where positive
    (Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", ICCV 2017,
    equations 1 and 2). By default the last maps that are no pooled ones and at least 4x4.
    Raises UserError for a class or layer that is not there, DataError for an image that cannot be read.
    """
    if wanted and wanted not in model.classes:
        raise UserError(f"--class {wanted}: no such class{nearest(wanted, model.classes)}")
    pixels_SSC, x_NCHW = _input(model, image)
    with torch.no_grad():
        maps, logits_NK = _maps(model.model, x_NCHW)
    chosen = layer or _default(model.model, maps)
    if chosen not in maps:
        raise UserError(f"--layer {layer}: it gives no maps{nearest(layer, maps)}")
    shares_K = logits_NK[0].float().softmax(0)
    best = shares_K.topk(min(TOP, len(model.classes)))
    number = model.classes.index(wanted) if wanted else int(best.indices[0])
    first, filters = _first_convolution(model.model)
    return Look(
        pixels_SSC=pixels_SSC,
        top=[(model.classes[k], share) for k, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
        wanted=model.classes[number],
        probability=float(shares_K[number]),
        layer=chosen,
        heat_HW=grad_cam(model.model, x_NCHW, chosen, number),
        filters_OIHW=filters,
        first=first,
        gray=max(model.augment.mean) - min(model.augment.mean) < 1e-6,
        stages=[Maps(name, maps[name][0].float().cpu().numpy()) for name in stages(model.model, maps)],
    )


def grad_cam(model: nn.Module, x_NCHW: torch.Tensor, layer: str, number: int) -> Floats:
    """(H, W) float32, 0 to 1: where the maps of `layer` speak for class `number` in the one image of `x_NCHW`."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output)
        return output.clone()  # what comes next may change it in place

    handle = dict(model.named_modules())[layer].register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits_NK = model(x_NCHW.clone().requires_grad_(True))
            (gradient_NCHW,) = torch.autograd.grad(logits_NK[0, number], kept[-1])
    finally:
        handle.remove()
    weights_NC11 = gradient_NCHW.mean((2, 3), keepdim=True)
    heat_HW = (weights_NC11 * kept[-1].detach()).sum(1)[0].clamp(min=0).float()
    values: Floats = (heat_HW / heat_HW.max().clamp(min=torch.finfo(torch.float32).tiny)).cpu().numpy()
    return values


def stages(model: nn.Module, maps: dict[str, torch.Tensor]) -> list[str]:
    """Of each size of maps the last block before they shrink, or where no block ends there the last layer, by depth.

    None whose maps are only pooled ones; no trunk, which is many stages at once.
    """
    modules = dict(model.named_modules())
    last: dict[int, str] = {}
    for name, values in maps.items():
        side, module = values.shape[-1], modules[name]
        if isinstance(module, _POOLS) or _ends_in_pool(module) or _is_trunk(name, module, maps):
            continue
        before = last.get(side, name)
        if _is_block(module) - name.count(".") / 100 >= _is_block(modules[before]) - before.count(".") / 100:
            last[side] = name  # a block before a layer, an outer one before what is in it
    return [name for side, name in sorted(last.items(), reverse=True) if side > 1]


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _ends_in_pool(module: nn.Module) -> bool:
    """Whether a block's last layer is a pooling one: its maps are another's, only smaller."""
    children = list(module.children())
    return bool(children) and (isinstance(children[-1], _POOLS) or _ends_in_pool(children[-1]))


def _is_trunk(name: str, module: nn.Module, maps: dict[str, torch.Tensor]) -> bool:
    """Whether a block begins with larger maps than it ends with, and another block in it ends where it does."""
    side = maps[name].shape[-1]
    children = {own: maps[f"{name}.{own}"].shape[-1] for own, _ in module.named_children() if f"{name}.{own}" in maps}
    blocks = [own for own, child in module.named_children() if own in children and _is_block(child)]
    return any(inner > side for inner in children.values()) and any(children[own] == side for own in blocks)


def _default(model: nn.Module, maps: dict[str, torch.Tensor]) -> str:
    """The last stage with maps large enough to show places, else the first stage."""
    names = stages(model, maps)
    if not names:
        raise UserError("the network has no maps to explain: its convolutions give single values")
    large = [name for name in names if maps[name].shape[-1] >= LEAST_SIDE]
    return large[-1] if large else names[0]


def _input(model: Classifier, image: Path) -> tuple[Pixels, torch.Tensor]:
    """(S, S, 3) uint8 pixels and the (1, 3, S, S) input of an image file."""
    loader = Loader(FileReader([image]), model.view, 0, 1, 0)
    try:
        (tile,) = next(loader.steps([[TileRequest(0, 0, 0, np.arange(1))]]))
        if loader.stats.bad:
            raise DataError(f"{image}: {loader.stats.bad[0].reason.removeprefix(f'cannot read {image}: ')}")
        x_NCHW, _ = model.augment(tile, model.device, train=False)
        return tile.images[0].numpy().copy(), x_NCHW
    finally:
        loader.close()


def _maps(model: nn.Module, x_NCHW: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What every module gives that is (1, C, H, H), by name in the order of the calls, and the logits.

    Of a layer called more than once, the last call. (torchvision's transformers also pass (1, H, W, C): left out.)
    """
    maps: dict[str, torch.Tensor] = {}
    with _watching(model, maps):
        logits_NK = model(x_NCHW)
    return maps, logits_NK


@contextmanager
def _watching(model: nn.Module, maps: dict[str, torch.Tensor]) -> Iterator[None]:
    def keep(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3]:
            maps.pop(name, None)  # to the end
            maps[name] = output.detach().clone()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
                hooks.callback(handle.remove)
        yield


def _first_convolution(model: nn.Module) -> tuple[str, Floats]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module.weight.detach().float().cpu().numpy()
    raise UserError("the network has no convolution to explain")
