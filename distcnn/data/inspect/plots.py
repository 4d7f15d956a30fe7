"""The plots of a page as PNG bytes, drawn with matplotlib's Agg, once for a light page and once for a dark one."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from distcnn.data.inspect.facts import Facts

WIDTH_INCHES = 5.4  # narrow: on a phone the letters stay legible
DOTS_PER_INCH = 160
MAX_BARS = 40
MAX_POINTS = 20_000
LABEL_LETTERS = 22


@dataclass(frozen=True)
class Style:
    """Colours of a page: the ink, the faint lines, and one colour a split (Okabe and Ito's, told apart by all)."""

    ink: str
    faint: str
    splits: tuple[str, ...]


LIGHT = Style("#333a44", "#d5d9df", ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00"))
DARK = Style("#c9d1da", "#3a424d", ("#56a9e0", "#f0b93a", "#3fc79a", "#e09ac4", "#f08a4a"))

Draw = Callable[[Any, Facts, Style], None]


@dataclass(frozen=True)
class Plot:
    """A plot in both styles, and what it shows in words."""

    title: str
    alt: str
    light: bytes
    dark: bytes


def plots(facts: Facts) -> list[Plot]:
    """The plots that say something about this set."""
    drawn: list[Plot] = []
    if any(split.labelled for split in facts.splits) and len(facts.classes) > 1:
        bars = len(facts.classes) <= MAX_BARS
        height = 0.9 + 0.27 * len(facts.classes) if bars else 2.8
        drawn.append(_plot("Images per class", _class_bars if bars else _class_curve, facts, height))
    if facts.uniform is None and facts.images:
        drawn.append(_plot("Width and height of the images, in pixels", _sizes, facts, 3.6))
        drawn.append(_plot("Aspect ratio (width / height)", _aspects, facts, 2.4))
    if facts.images:
        drawn.append(_plot("Mean brightness of the images", _brightness, facts, 2.4))
    return drawn


def _plot(title: str, draw: Draw, facts: Facts, height_inches: float) -> Plot:
    pictures = []
    for style in (LIGHT, DARK):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes, facts, style)
        _dress(axes, style)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, transparent=True)
        pictures.append(buffer.getvalue())
    return Plot(title, f"{title}, by split", pictures[0], pictures[1])


def _dress(axes: Any, style: Style) -> None:
    """Ink, faint grid, no box; names are drawn as they are, '$' included."""
    axes.tick_params(colors=style.ink, labelsize=9, length=0)
    axes.grid(color=style.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(style.ink)
        label.set_fontsize(9)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = min(len(labels), 4)
        legend = axes.figure.legend(
            handles,
            labels,
            loc="outside upper right",
            ncols=columns,
            frameon=False,
            fontsize=9,
            labelcolor=style.ink,
            markerscale=2,
        )
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            handle.set_alpha(1)
            text.set_parse_math(False)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)


def _class_bars(axes: Any, facts: Facts, style: Style) -> None:
    """A bar a class, the splits stacked."""
    places = np.arange(len(facts.classes))
    left = np.zeros(len(facts.classes))
    for number, split in enumerate(facts.splits):
        if split.labelled:
            color = style.splits[number % len(style.splits)]
            axes.barh(places, split.class_counts, 0.72, left, color=color, label=drawable(split.name, number))
            left += split.class_counts
    axes.set_yticks(places, [drawable(name, label) for label, name in enumerate(facts.classes)])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlabel("images")


def _class_curve(axes: Any, facts: Facts, style: Style) -> None:
    """For many classes: their sizes, the largest first."""
    for number, split in enumerate(facts.splits):
        if split.labelled:
            color = style.splits[number % len(style.splits)]
            counts = np.sort(split.class_counts)[::-1]
            axes.plot(np.arange(1, len(counts) + 1), counts, color=color, label=drawable(split.name, number))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("classes, the largest first")
    axes.set_ylabel("images")


def _sizes(axes: Any, facts: Facts, style: Style) -> None:
    columns = facts.columns
    shown = np.arange(len(columns))
    if len(shown) > MAX_POINTS:
        shown = np.unique(np.linspace(0, len(columns) - 1, MAX_POINTS).astype(int))
    for number, split in enumerate(facts.splits):
        mine = shown[columns.split[shown] == number]
        color = style.splits[number % len(style.splits)]
        name = drawable(split.name, number)
        axes.scatter(columns.width[mine], columns.height[mine], 9, color=color, alpha=0.35, linewidths=0, label=name)
    if _spread(columns.width) > 8 or _spread(columns.height) > 8:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("width")
    axes.set_ylabel("height")


def _aspects(axes: Any, facts: Facts, style: Style) -> None:
    ratio = facts.columns.width / facts.columns.height
    low, high = np.quantile(ratio, [0.002, 0.998])
    edges = np.linspace(min(low, 0.95), max(high, 1.05), 41)
    _histogram(axes, facts, style, np.clip(ratio, edges[0], edges[-1]), edges)


def _brightness(axes: Any, facts: Facts, style: Style) -> None:
    _histogram(axes, facts, style, facts.columns.brightness, np.linspace(0, 1, 41))
    axes.set_xlim(0, 1)


def _histogram(axes: Any, facts: Facts, style: Style, values: NDArray[Any], edges: NDArray[Any]) -> None:
    """A line a split: the share of its images, so that splits of different sizes compare."""
    for number, split in enumerate(facts.splits):
        mine = values[facts.columns.split == number]
        share = 100 * np.histogram(mine, edges)[0] / max(1, len(mine))
        color = style.splits[number % len(style.splits)]
        axes.stairs(share, edges, color=color, fill=number == 0, alpha=0.55 if number == 0 else 1, linewidth=1.6)
        axes.plot([], [], color=color, linewidth=3, label=drawable(split.name, number))
    axes.set_ylabel("% of images")
    axes.set_ylim(bottom=0)


def _spread(values: NDArray[Any]) -> float:
    return float(values.max() / max(1, values.min()))


def drawable(name: str, number: int) -> str:
    """A name short enough for an axis, or '#3' where the font lacks one of its letters (the page has the names)."""
    known = _letters()
    if not name.strip() or not name.isprintable() or any(ord(letter) not in known for letter in name):
        return f"#{number}"
    return name if len(name) <= LABEL_LETTERS else name[: LABEL_LETTERS - 1] + "…"


@cache
def _letters() -> frozenset[int]:
    """The code points that matplotlib's own font can draw, control characters left out."""
    return frozenset(code for code in get_font(findfont("DejaVu Sans")).get_charmap() if code >= 0x20)
