"""Plots as PNG bytes, drawn with matplotlib's Agg, once for a light page and once for a dark one."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from PIL import Image, ImageDraw, ImageFont

WIDTH_INCHES = 5.4  # narrow: on a phone the letters stay legible
DOTS_PER_INCH = 160
LABEL_LETTERS = 22
TITLE_LETTERS, TITLE_PIXELS = 64, 33  # of a line of a picture's title


@dataclass(frozen=True)
class Style:
    """Colours of a page: the ink, the faint lines, the card, and one colour a series (Okabe and Ito's, told apart
    by all)."""

    ink: str
    faint: str
    card: str
    series: tuple[str, ...]

    def color(self, number: int) -> str:
        """The colour of a series; after the last the first comes again."""
        return self.series[number % len(self.series)]


LIGHT = Style("#333a44", "#d5d9df", "#ffffff", ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00"))
DARK = Style("#c9d1da", "#3a424d", "#1a2027", ("#56a9e0", "#f0b93a", "#3fc79a", "#e09ac4", "#f08a4a"))

Draw = Callable[[Any, Style], None]  # draws on matplotlib axes


@dataclass(frozen=True)
class Plot:
    """A plot in both styles, and what it shows in words. `name`: of its file, where it is to have one."""

    title: str
    alt: str
    light: bytes
    dark: bytes
    name: str = ""


def plot(title: str, alt: str, draw: Draw, height_inches: float, name: str = "") -> Plot:
    """What `draw` draws, in both styles."""
    light, dark = (picture(draw, height_inches, style) for style in (LIGHT, DARK))
    return Plot(title, alt, light, dark, name)


def as_file(drawn: Plot) -> bytes:
    """A plot in the light style for itself, as PNG bytes: on its card, with its title."""
    lines = textwrap.wrap(drawn.title, TITLE_LETTERS)
    with Image.open(io.BytesIO(drawn.light)) as found:
        card = Image.new(
            "RGBA", (found.width, found.height + TITLE_PIXELS * len(lines) + TITLE_PIXELS // 2), LIGHT.card
        )
        card.alpha_composite(found.convert("RGBA"), (0, card.height - found.height))
    pen, font = ImageDraw.Draw(card), ImageFont.truetype(findfont("DejaVu Sans"), TITLE_PIXELS * 2 // 3)
    for number, line in enumerate(lines):
        pen.text((12, 10 + TITLE_PIXELS * number), line, LIGHT.ink, font)
    buffer = io.BytesIO()
    card.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def picture(draw: Draw, height_inches: float, style: Style = LIGHT, transparent: bool = True) -> bytes:
    """What `draw` draws, as PNG bytes."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, style)
    _dress(axes, style)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, transparent=transparent)
    return buffer.getvalue()


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
        _legend(axes, handles, labels, style)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)


def _legend(axes: Any, handles: list[Any], labels: list[str], style: Style) -> None:
    """Above the axes, in up to four columns."""
    legend = axes.figure.legend(
        handles,
        labels,
        loc="outside upper right",
        ncols=min(len(labels), 4),
        frameon=False,
        fontsize=9,
        labelcolor=style.ink,
        markerscale=2,
    )
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        handle.set_alpha(1)
        text.set_parse_math(False)


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
