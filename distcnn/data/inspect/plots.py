"""The plots of inspect.html."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from distcnn.data.inspect.facts import Facts
from distcnn.plotting import Plot, Style, drawable, plot

MAX_BARS = 40
MAX_POINTS = 20_000


Draw = Callable[[Any, Facts, Style], None]


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
    return plot(title, f"{title}, by split", lambda axes, style: draw(axes, facts, style), height_inches)


def _class_bars(axes: Any, facts: Facts, style: Style) -> None:
    """A bar a class, the splits stacked."""
    places = np.arange(len(facts.classes))
    left = np.zeros(len(facts.classes))
    for number, split in enumerate(facts.splits):
        if split.labelled:
            color = style.color(number)
            axes.barh(places, split.class_counts, 0.72, left, color=color, label=drawable(split.name, number))
            left += split.class_counts
    axes.set_yticks(places, [drawable(name, label) for label, name in enumerate(facts.classes)])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlabel("images")


def _class_curve(axes: Any, facts: Facts, style: Style) -> None:
    """For many classes: their sizes, the largest first."""
    for number, split in enumerate(facts.splits):
        if split.labelled:
            color = style.color(number)
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
        color = style.color(number)
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
        color = style.color(number)
        axes.stairs(share, edges, color=color, fill=number == 0, alpha=0.55 if number == 0 else 1, linewidth=1.6)
        axes.plot([], [], color=color, linewidth=3, label=drawable(split.name, number))
    axes.set_ylabel("% of images")
    axes.set_ylim(bottom=0)


def _spread(values: NDArray[Any]) -> float:
    return float(values.max() / max(1, values.min()))
