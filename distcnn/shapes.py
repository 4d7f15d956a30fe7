"""A network layer by layer from shapes alone: one training pass on torch's meta device, where tensors have no bytes.

Receptive field of a value of a layer, in input pixels: from the input on, a kernel of k with dilation d adds
(k - 1) * d * j, where the jump j is the product of all strides before; where paths meet, the larger one counts, so it
is that of the longest path (Araujo, Norris, Sim, "Computing receptive fields of convolutional neural networks", Distill
2019). A mean over all positions, or a linear layer over them, sees the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distcnn.config import ModelConfig
from distcnn.models import build_model

WHOLE, UNKNOWN = math.inf, math.nan  # fields: the whole image; not given (behind attention)
_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution
_POOLS = (_aten.max_pool2d_with_indices, _aten.max_pool2d, _aten.avg_pool2d)
_MATRIX_PRODUCTS = (_aten.addmm, _aten.mm)
_ATTENTION = (_aten.bmm, _aten.baddbmm)
_APPENDED = (  # stand in the row of the layer before them
    *(nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm),
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.ELU, nn.LeakyReLU),
)
_SHORT = {"relu6": "relu", "localresponsenorm": "norm", "batchnorm2d": "norm", "layernorm": "norm", "groupnorm": "norm"}


@dataclass
class LayerShape:
    """A layer, with the norm and activation that follow it. Multiply-adds and the output are of one image."""

    name: str
    kind: str
    output: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: int = 0  # of convolutions and matrix products
    field: float = 1.0  # pixels of the input that a value depends on, along a side; WHOLE, UNKNOWN
    kept_bytes: int = 0  # of activations, from the forward to the backward pass of the tile


@dataclass(frozen=True)
class _Field:
    """Receptive field and jump in input pixels, and the positions along a side of the map."""

    pixels: float
    jump: float
    side: int


def meta_model(config: ModelConfig, classes: int, size: int) -> nn.Module:
    """The model of a config on the meta device. Raises UserError as `build_model` does."""
    try:
        with torch.device("meta"):
            return build_model(config, classes, size, seed=0)
    except NotImplementedError:  # a few of torchvision's (RegNet) compute with tensors while they are built
        return build_model(config, classes, size, seed=0).to("meta")


def layer_shapes(model: nn.Module, tile: int, size: int, half: bool = False) -> list[LayerShape]:
    """The layers of `model`, which lies on the meta device, in the order in which (tile, 3, size, size) meets them.

    `half`: activations in 16 bit, as under autocast. Parameters that belong to no layer called are a row of their own.
    Raises RuntimeError, in torch's words, for an input that the network cannot take.
    """
    walk = _Walk(tile)
    images = torch.empty((tile, 3, size, size), device="meta").to(memory_format=torch.channels_last)
    walk.see(images, _Field(1.0, 1.0, size))
    model.train()

    def keep(number: int) -> None:
        walk.rows[-1 if walk.rows else 0].kept_bytes += number

    with _rows_of(model, walk), walk, _kept(model, half, keep):
        model(images).sum()
    for row in walk.rows:
        row.multiply_adds //= tile
    rest = sum(p.numel() for p in model.parameters()) - sum(row.parameters for row in walk.rows)
    return [*walk.rows, LayerShape("", "other parameters", parameters=rest)] if rest else walk.rows


def activation_bytes(model: nn.Module, tile: int, size: int, half: bool) -> int:
    """Bytes that autograd keeps between forward and backward of (tile, 3, size, size) on a model on the meta device."""
    numbers: list[int] = []
    model.train()
    images = torch.empty((tile, 3, size, size), device="meta").to(memory_format=torch.channels_last)
    with _kept(model, half, numbers.append):
        model(images).sum()
    return sum(numbers)


@contextmanager
def _kept(model: nn.Module, half: bool, keep: Callable[[int], None]) -> Iterator[None]:
    """Calls `keep` with the bytes of each storage that autograd saves, once; the model's own tensors do not count."""
    seen: dict[int, torch.Tensor | None] = {t.untyped_storage()._cdata: None for t in _tensors(model)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor  # held: no id comes twice
            width = 2 if half and tensor.is_floating_point() else tensor.element_size()
            keep(storage.nbytes() // tensor.element_size() * width)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def _rows_of(model: nn.Module, walk: _Walk) -> Iterator[None]:
    """Begins a row of `walk` with every layer that is called, or appends it to the row before."""
    counted: set[int] = set()

    def begin(name: str, module: nn.Module) -> None:
        if not (_appended(module) and walk.rows):
            walk.rows.append(LayerShape(name, kind_of(module)))
        elif isinstance(module, _APPENDED) and not walk.rows[-1].kind.endswith(kind_of(module)):
            walk.rows[-1].kind += f" + {kind_of(module)}"
        new = [p for p in module.parameters() if id(p) not in counted]
        walk.rows[-1].parameters += sum(p.numel() for p in new)
        counted.update(map(id, new))

    def end(module: nn.Module, output: Any) -> None:
        if walk.rows and not walk.rows[-1].output and isinstance(output, torch.Tensor):
            walk.rows[-1].output = tuple(output.shape[1:])
            walk.rows[-1].field = walk.field(output).pixels

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention) or next(module.children(), None) is None:
                if ".out_proj" in name:  # attention uses its weights without calling it
                    continue
                before = module.register_forward_pre_hook(lambda module, inputs, name=name: begin(name, module))
                after = module.register_forward_hook(lambda module, inputs, output: end(module, output))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        yield


def _appended(module: nn.Module) -> bool:
    """Whether a layer stands in the row of the one before it: norms and activations, and what only passes values on."""
    own = not type(module).__module__.startswith("torch.nn")  # such as torchvision's Permute
    passes = isinstance(module, (nn.Dropout, nn.Flatten, nn.Identity)) or own
    return isinstance(module, _APPENDED) or (passes and next(module.parameters(), None) is None)


def kind_of(module: nn.Module) -> str:
    """A layer in few words: 'conv 3x3 /2', 'max pool 2x2 /2', 'linear', 'relu', else its class."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        words = [f"conv {height}x{width}", *_strides(module.stride)]
        words += [f"dilation {module.dilation[0]}"] * (max(module.dilation) > 1)
        depthwise = module.groups == module.in_channels
        words += ["depthwise" if depthwise else f"{module.groups} groups"] * (module.groups > 1)
        return " ".join(words)
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        side = module.kernel_size if isinstance(module.kernel_size, int) else max(module.kernel_size)
        name = "max pool" if isinstance(module, nn.MaxPool2d) else "avg pool"
        return " ".join([f"{name} {side}x{side}", *_strides(module.stride)])
    if isinstance(module, nn.AdaptiveAvgPool2d):
        wanted: Any = module.output_size  # a number, or two
        side = wanted if isinstance(wanted, int) else wanted[0]
        return f"avg pool to {side}x{side}"
    known = (of for of in type(module).__mro__ if of.__module__.startswith("torch.nn") and of is not nn.Module)
    name = next(known, type(module)).__name__.lower()
    return _SHORT.get(name, name)


def _strides(stride: Any) -> list[str]:
    step = stride if isinstance(stride, int) else max(stride)
    return [f"/{step}"] if step > 1 else []


class _Walk(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation: counts multiply-adds for the row under way, and carries receptive fields along.

    Fields are kept by storage, so that views and what is changed in place have them, too.
    """

    def __init__(self, tile: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tile = tile
        self.rows: list[LayerShape] = []
        self._fields: dict[int, tuple[_Field, torch.Tensor]] = {}  # the tensor is held: no id comes twice

    def see(self, tensor: torch.Tensor, field: _Field) -> None:
        self._fields[tensor.untyped_storage()._cdata] = (field, tensor)

    def field(self, tensor: torch.Tensor) -> _Field:
        """What is known of it; a point for what does not come from the image."""
        known = self._fields.get(tensor.untyped_storage()._cdata)
        return known[0] if known else _Field(0.0, 0.0, 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)]
        fields = [self.field(tensor) for tensor in inputs]  # before anything changes in place
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation in flop_registry and self.rows:
            flops = flop_registry[operation](*args, **(kwargs or {}), out_val=result)
            self.rows[-1].multiply_adds += int(flops) // 2
        outputs = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(t)]
        if fields and outputs:
            field = _after(operation, args, inputs, _meet(fields), outputs[0], self._tile)
            for output in outputs:
                self.see(output, field)
        return result


def _meet(fields: list[_Field]) -> _Field:
    """Where paths meet: the largest field and jump."""
    if any(math.isnan(field.pixels) for field in fields):
        return _Field(UNKNOWN, 1.0, 1)
    return _Field(*(max(getattr(field, name) for field in fields) for name in ("pixels", "jump", "side")))


def _after(
    operation: Any, args: Any, inputs: list[torch.Tensor], field: _Field, output: torch.Tensor, tile: int
) -> _Field:
    """The field behind an operation whose inputs have `field`, in a pass of `tile` images."""
    if operation in _ATTENTION or "attention" in str(operation):
        return _Field(UNKNOWN, 1.0, 1)
    if operation is _CONVOLUTION:
        return _grown(field, inputs[1].shape[2:], args[3], args[5], output)
    if operation in _POOLS:
        return _grown(field, args[1], (args[2] if len(args) > 2 else []) or args[1], [1], output)
    if operation is _aten._adaptive_avg_pool2d:
        step = inputs[0].shape[-1] / output.shape[-1]
        return _grown(field, [math.ceil(step)], [step], [1], output)
    if operation in (_aten.mean, _aten.amax) and field.side > 1 and len(args) > 1 and len(args[1] or [0, 0]) >= 2:
        return _Field(WHOLE, field.jump * field.side, 1)
    if operation in _MATRIX_PRODUCTS and field.side > 1:
        per_image = inputs[-2].shape[0] == tile  # else the matrix has a row for each position
        return _Field(WHOLE, field.jump * field.side, 1) if per_image else field
    return field


def _grown(field: _Field, kernel: Any, stride: Any, dilation: Any, output: torch.Tensor) -> _Field:
    reach = max((k - 1) * d for k, d in zip(kernel, list(dilation) * len(kernel), strict=False))
    return _Field(field.pixels + reach * field.jump, field.jump * max(stride), output.shape[-1])
