"""Pages of one file that need nothing else, for a desk and for a phone, by day and by night.

Names of classes, shards and keys come from strangers: every one passes `text`. A page has no scripts, and its content
security policy would run none.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distcnn import __version__
from distcnn.pictures import png_uri
from distcnn.text import shown

if TYPE_CHECKING:
    from distcnn.plotting import Plot

STYLE_FILE = Path(__file__).with_name("page.css")


def document(title: str, program: str, header: str, sections: Iterable[str]) -> str:
    """The whole page as text. `title` is a name, `header` and `sections` are HTML already."""
    name = text(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name} - distcnn {program}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><style>{STYLE_FILE.read_text(encoding="utf-8")}</style></head>'
        f"<body><header><h1>{name}</h1>{header}</header><main>{''.join(sections)}</main>"
        f"<footer>distcnn {__version__} {program}</footer></body></html>\n"
    )


def text(name: str) -> str:
    """A name made harmless."""
    return html.escape(shown(name), quote=True)


def section(title: str, content: str) -> str:
    """A card of the page; "" without content."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Cells are HTML already. The first `words` columns (1 to 4) hold words, the others numbers."""
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="w{words}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """The figures that matter most, each with what it is."""
    return '<div class="tiles">' + "".join(f"<div><b>{value}</b>{what}</div>" for value, what in values) + "</div>"


def figure(plot: Plot) -> str:
    """A plot that follows the reader's choice of a light or a dark page."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{png_uri(plot.dark)}">'
    image = f'<img src="{png_uri(plot.light)}" alt="{html.escape(plot.alt)}">'
    return f"<figure><figcaption>{text(plot.title)}</figcaption><picture>{dark}{image}</picture></figure>"
