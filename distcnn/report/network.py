"""The network of a run as a drawing: its feature maps from the image to the classes, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distcnn.describe import Description, comparison, describe
from distcnn.errors import UserError
from distcnn.page import text
from distcnn.plotting import Plot, Style, plot
from distcnn.report.gather import RunFacts
from distcnn.shapes import LayerShape
from distcnn.text import counted

STAGES_SHOWN = 8
HEIGHT_INCHES = 2.3


@dataclass(frozen=True)
class Stage:
    """Consecutive layers whose maps have one size: channels (of the last), side in pixels, how many layers."""

    channels: int
    side: int
    layers: int


def stages_of(layers: Sequence[LayerShape], size: int) -> list[Stage]:
    """The image, then a stage for each size of map, the vectors behind the last map as one of side 1."""
    stages = [Stage(3, size, 0)]
    for layer in layers:
        if not layer.output:
            continue
        channels, side = layer.output[0], layer.output[1] if len(layer.output) == 3 else 1
        before = stages[-1]
        if side == before.side and before.layers:
            stages[-1] = Stage(channels, side, before.layers + 1)
        else:
            stages.append(Stage(channels, side, 1))
    return stages


def network(run: RunFacts) -> tuple[Plot, str] | None:
    """(drawing, sentences as HTML) of a run's network; None where its input or its classes are not known."""
    size = run.dataset.size if run.dataset else run.config.data.image_size
    if not size or not run.classes:
        return None
    try:
        found = describe(run.config, run.classes, size)
    except UserError:
        return None
    stages = stages_of(found.layers, size)
    if len(stages) > STAGES_SHOWN:
        stages = [*stages[: STAGES_SHOWN - 1], stages[-1]]
    shapes = " to ".join(f"{stage.channels} x {stage.side} x {stage.side}" for stage in stages)
    drawing = plot(
        "Feature maps from the image to the classes",
        f"sizes of maps: {shapes}",
        _drawing(stages),
        HEIGHT_INCHES,
        "network",
    )
    return drawing, f"<p>{text(_words(found))}</p><p>{text(comparison(found))}</p>"


def _words(found: Description) -> str:
    layers = sum(bool(layer.output) for layer in found.layers)
    products = sum(layer.multiply_adds for layer in found.layers)
    return (
        f"{found.model}: {counted(layers, 'layer')}, {found.parameters:,} parameters, {products:,} multiply-adds an"
        f" image. 'distcnn describe' has each layer."
    )


def _drawing(stages: Sequence[Stage]) -> Any:
    """A box a stage: as high as its maps are wide (by the root), as thick as they are many (by the logarithm)."""

    def draw(axes: Any, style: Style) -> None:
        from matplotlib.patches import Rectangle

        left, top = 0.0, math.sqrt(stages[0].side)
        for number, stage in enumerate(stages):
            height, width = math.sqrt(stage.side) / top, 0.12 + 0.1 * math.log2(stage.channels + 1)
            color = style.faint if not number else style.color(0)
            axes.add_patch(Rectangle((left, -height / 2), width, height, facecolor=color, alpha=0.85, zorder=2))
            what = "image" if not number else f"{stage.layers} layer{'s' * (stage.layers > 1)}"
            shape = f"{stage.channels}" if stage.side == 1 else f"{stage.channels} x\n{stage.side} x {stage.side}"
            for place, said, align in ((0.56, what, "bottom"), (-0.56, shape, "top")):
                axes.text(left + width / 2, place, said, ha="center", va=align, fontsize=8, color=style.ink)
            left += width + 0.55
        axes.set_xlim(-0.35, left - 0.2)
        axes.set_ylim(-1.0, 0.8)
        axes.set_xticks([])
        axes.set_yticks([])

    return draw
