"""The picture of a look: input, heat, probabilities; first filters; the strongest maps of each stage."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from distcnn.explain.look import TOP, Floats, Look
from distcnn.plotting import LIGHT, drawable

WIDTH_INCHES, DOTS_PER_INCH = 8.0, 110
MAPS = 10  # of a stage
FILTERS = 64
COLUMNS = 16  # of filters
TOP_INCHES, ROW_INCHES = 2.7, 0.92
CELL = 48  # pixels of a filter or map on its sheet, at least
HEAT_SIDE = 256

Rgb = NDArray[np.float32]  # (H, W, 3), 0 to 1


def picture(found: Look) -> bytes:
    """PNG bytes, about 880 pixels wide."""
    filter_rows = -(-min(len(found.filters_OIHW), FILTERS) // COLUMNS)
    heights = [TOP_INCHES, 0.25 + 0.48 * filter_rows, *([ROW_INCHES] * len(found.stages))]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    top = grid[0].subgridspec(1, 3, width_ratios=(1, 1, 0.95))
    side = found.pixels_SSC.shape[0]
    _show(figure.add_subplot(top[0]), found.pixels_SSC, f"what the network sees\n{side} x {side} pixels")
    _heat(figure.add_subplot(top[1]), found)
    _bars(figure.add_subplot(top[2]), found)
    _show(figure.add_subplot(grid[1]), filter_sheet(found), _filters_title(found))
    for row, maps in enumerate(found.stages, 2):
        channels, height, width = maps.values_CHW.shape
        shown = maps.strongest[:MAPS]
        title = f"{maps.layer}: the {len(shown)} strongest of {channels} maps of {height} x {width}"
        sheet = contact_sheet([_coloured(maps.values_CHW[channel]) for channel in shown], MAPS)
        _show(figure.add_subplot(grid[row]), sheet, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return buffer.getvalue()


def contact_sheet(cells: list[Rgb], columns: int) -> Rgb:
    """Square cells of one size side by side in rows of `columns`, white between them, enlarged so that pixels show."""
    factor = max(-(-CELL // cells[0].shape[0]), 1)
    cells = [cell.repeat(factor, 0).repeat(factor, 1) for cell in cells]
    side, gap = cells[0].shape[0], max(cells[0].shape[0] // 12, 1)
    rows = -(-len(cells) // columns)
    sheet = np.ones((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), dtype=np.float32)
    for number, cell in enumerate(cells):
        top, left = (number // columns) * (side + gap), (number % columns) * (side + gap)
        sheet[top : top + side, left : left + side] = cell
    return sheet


def filter_sheet(found: Look) -> Rgb:
    """The first layer's filters: as colours, 0 being gray; of a gray network their sum over the channels."""
    filters = found.filters_OIHW[:FILTERS]
    cells = []
    for filter_IHW in filters:
        if found.gray or len(filter_IHW) != 3:
            sum_HW = filter_IHW.sum(0)
            cells.append(_mapped("RdBu_r", 0.5 + 0.5 * sum_HW / max(float(np.abs(sum_HW).max()), 1e-12)))
        else:
            scaled_IHW = 0.5 + 0.5 * filter_IHW / max(float(np.abs(filter_IHW).max()), 1e-12)
            cells.append(np.ascontiguousarray(scaled_IHW.transpose(1, 2, 0)))
    return contact_sheet(cells, COLUMNS)


def _filters_title(found: Look) -> str:
    count, _, height, width = found.filters_OIHW.shape
    shown = f"{count}" if count <= FILTERS else f"{FILTERS} of {count}"
    colours = "summed over the channels, red positive, blue negative" if found.gray else "as colours, gray is 0"
    return f"{found.first}: {shown} filters of {height} x {width}, {colours}"


def _coloured(values_HW: Floats) -> Rgb:
    """A map in viridis, from its least value (or 0) to its largest."""
    low = min(float(values_HW.min()), 0.0)
    return _mapped("viridis", (values_HW - low) / max(float(values_HW.max()) - low, 1e-12))


def _mapped(name: str, values: NDArray[Any]) -> Rgb:
    colours: Rgb = matplotlib.colormaps[name](values)[..., :3].astype(np.float32)
    return colours


def _heat(axes: Any, found: Look) -> None:
    """The image in gray, and over it the heat: the more, the less transparent."""
    side = found.pixels_SSC.shape[0]
    gray = 0.35 + 0.65 * found.pixels_SSC.mean(2) / 255
    axes.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=(0, side, side, 0), interpolation="nearest")
    heat_NCHW = torch.from_numpy(found.heat_HW)[None, None]
    smooth = torch.nn.functional.interpolate(heat_NCHW, (HEAT_SIDE, HEAT_SIDE), mode="bilinear")[0, 0].numpy()
    rgba = matplotlib.colormaps["inferno"](0.25 + 0.7 * smooth)
    rgba[..., 3] = 0.65 * smooth**0.8
    axes.imshow(rgba, extent=(0, side, side, 0), interpolation="bilinear")
    height, width = found.heat_HW.shape
    name = drawable(found.wanted, 0)
    said = f"what speaks for {name}" if found.heat_HW.any() else f"nothing speaks for {name}"
    _dress(axes, f"{said}\nGrad-CAM of {found.layer}, {height} x {width}")


def _bars(axes: Any, found: Look) -> None:
    """The most probable classes; the one that the heat is for is coloured."""
    rows = found.top + ([] if found.wanted in dict(found.top) else [(found.wanted, found.probability)])
    places = np.arange(len(rows))
    colours = [LIGHT.series[4] if name == found.wanted else LIGHT.series[0] for name, _ in rows]
    axes.barh(places, [share for _, share in rows], 0.35, color=colours)
    for place, (name, share) in zip(places, rows, strict=True):
        text = f"{drawable(name, int(place))}  {100 * share:.1f} %"
        axes.text(0, place - 0.26, text, fontsize=8.5, color=LIGHT.ink, va="bottom", parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(rows), TOP) - 0.5, -0.7)
    axes.set_axis_off()
    axes.set_title("what it says\nmost probable classes", fontsize=9, color=LIGHT.ink, loc="left")


def _show(axes: Any, pixels: NDArray[Any], title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    _dress(axes, title)


def _dress(axes: Any, title: str) -> None:
    axes.set_anchor("W")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=9, color=LIGHT.ink, loc="left", parse_math=False)
