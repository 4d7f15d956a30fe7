"""What a network is made of, as text: its layers from shapes alone, beside a fully connected net on the same input."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import torch
from torch import nn

from distcnn.config import TrainConfig
from distcnn.errors import UserError
from distcnn.files import binary_size
from distcnn.shapes import LayerShape, layer_shapes, meta_model

HEADER = ("layer", "what", "output", "parameters", "multiply-adds", "field", "activations")
WIDTH = 110  # of sentences
LEGEND = (
    "multiply-adds: of convolutions and matrix products, for one image. activations: what a training pass of a tile of"
    " {tile} images keeps for the backward pass.",
    "field: the receptive field, the side in input pixels of what one output value depends on, along the longest path:"
    " each layer adds (kernel - 1) x dilation x the product of the strides before it; 'all' is the whole image"
    "{beyond}.",
)


@dataclass(frozen=True)
class Description:
    """The layers of a network for (tile, 3, size, size), and those of the fully connected net beside it."""

    model: str
    size: int
    classes: int
    tile: int
    layers: list[LayerShape]
    dense: list[LayerShape]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def hidden(self) -> tuple[int, ...]:
        """The shape of the first layer's output, as many numbers as the fully connected net has hidden units."""
        return self.layers[0].output


def describe(config: TrainConfig, classes: int, size: int) -> Description:
    """The network of a config, seen on the meta device: no weights are allocated.

    Raises UserError for a network that is not known, or cannot take images of this size.
    """
    tile, half = config.optim.tile_size, config.run.mixed_precision != "no"
    model = meta_model(config.model, classes, size)
    try:
        layers = layer_shapes(model, tile, size, half)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{config.model.model} cannot take images of {size} px: {reason}") from error
    units, inputs = math.prod(layers[0].output), 3 * size * size
    with torch.device("meta"):
        dense = nn.Sequential(nn.Flatten(), nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, classes))
    return Description(config.model.model, size, classes, tile, layers, layer_shapes(dense, tile, size, half)[-2:])


def as_text(found: Description) -> str:
    """Both tables, what their columns mean, and what the comparison says."""
    title = f"{found.model} on 3 x {found.size} x {found.size}, {found.classes} classes"
    beyond = any(math.isfinite(layer.field) and layer.field > found.size for layer in found.layers)
    beyond_text = "; one larger than the image reaches into its border of zeros" if beyond else ""
    dense = [
        ("hidden", "flatten + linear + relu", *_numbers(found.dense[0])),
        ("output", "linear", *_numbers(found.dense[1])),
    ]
    lines = [title, *_table([_row(layer) for layer in found.layers], found.layers), ""]
    lines += [line for text in LEGEND for line in _wrap(text.format(tile=found.tile, beyond=beyond_text))]
    lines += ["", "A fully connected net on the same input, with as many hidden units:", *_table(dense, found.dense)]
    return "\n".join([*lines, "", *_wrap(comparison(found))])


def comparison(found: Description) -> str:
    """One sentence: why convolutions."""
    first, dense = found.layers[0], found.dense[0]
    shape = " x ".join(map(str, found.hidden))
    times = dense.parameters / max(first.parameters, 1)
    return (
        f"The first layer gives {shape} = {math.prod(found.hidden):,} values either way, with {first.parameters:,}"
        f" parameters as a convolution and {dense.parameters:,} fully connected ({_factor(times)} times as many): a"
        " convolution keeps rows and columns as they lie and looks at every place with the same few weights, where a"
        " fully connected layer forgets which pixels were neighbours and learns every place anew."
    )


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


def _factor(times: float) -> str:
    return f"{times:,.0f}" if times >= 10 else f"{times:.2g}"


def _row(layer: LayerShape) -> tuple[str, ...]:
    return (layer.name, layer.kind, *_numbers(layer))


def _numbers(layer: LayerShape) -> tuple[str, ...]:
    return (
        " x ".join(map(str, layer.output)),
        f"{layer.parameters:,}",
        f"{layer.multiply_adds:,}",
        _pixels(layer),
        binary_size(layer.kept_bytes),
    )


def _pixels(layer: LayerShape) -> str:
    if not layer.output or math.isnan(layer.field):
        return "-"
    return "all" if math.isinf(layer.field) else f"{layer.field:,.0f}"


def _table(rows: list[tuple[str, ...]], layers: list[LayerShape]) -> list[str]:
    """Aligned lines: a header, the rows, and their sum."""
    total = (
        "total",
        f"{len(layers)} layers",
        "",
        f"{sum(layer.parameters for layer in layers):,}",
        f"{sum(layer.multiply_adds for layer in layers):,}",
        "",
        binary_size(sum(layer.kept_bytes for layer in layers)),
    )
    table = [HEADER, *rows, total]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if column < 2 else f"{cell:>{width}}" for column, (cell, width) in _cells(row, widths)
        )
        for row in table
    ]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _cells(row: tuple[str, ...], widths: list[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(row, widths, strict=True)))
