"""inspect.html: one file that needs nothing else, for a desk and for a phone, by day and by night.

Names of classes, shards and keys come from strangers: every one passes `_text`. The page has no scripts, and its
content security policy would run none.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distcnn import __version__
from distcnn.data.inspect.advice import Advice, training_split
from distcnn.data.inspect.facts import Facts
from distcnn.data.inspect.pictures import Album, Places, pairs_to_show, png_uri, samples_of_classes
from distcnn.data.inspect.plots import Plot
from distcnn.data.inspect.text import channels, shown, size

MAX_BAD_ROWS = 500
STYLE_FILE = Path(__file__).with_name("page.css")


def page(facts: Facts, advice: list[Advice], plots: list[Plot], album: Album) -> str:
    """The whole page as text."""
    pairs = pairs_to_show(facts)
    samples = samples_of_classes(facts, training_split(facts).name)
    album.load(np.concatenate([*facts.extremes.values(), pairs.reshape(-1), *(places for _, places in samples)]))
    sections = [
        _section("What to do", _advice(advice)),
        _section("Splits", _splits(facts)),
        _section("Classes", f'<div class="pair">{_plots(plots, "class")}{_class_table(facts)}</div>'),
        _section("Samples", _samples(facts, samples, album)),
        _section("Images", _images(facts) + f'<div class="plots">{_plots(plots, "")}{_mean_image(facts)}</div>'),
        _section("Extremes", _extremes(facts, album)),
        _section("Look-alikes", _pairs(facts, pairs, album)),
        _section("Left out", _bad(facts)),
    ]
    name = _text(facts.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name} - distcnn inspect</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><style>{STYLE_FILE.read_text(encoding="utf-8")}</style></head>'
        f"<body><header><h1>{name}</h1>{_tiles(facts)}</header><main>{''.join(sections)}</main>"
        f"<footer>distcnn {__version__} inspect</footer></body></html>\n"
    )


def _text(name: str) -> str:
    """A name made harmless."""
    return html.escape(shown(name), quote=True)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Cells are HTML already. The first `words` columns hold words, the others numbers."""
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="w{words}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _tiles(facts: Facts) -> str:
    total = sum(split.bytes for split in facts.splits)
    columns = facts.columns
    if facts.uniform:
        sides = f"{facts.uniform[0]} x {facts.uniform[1]}"
    elif facts.images:
        sides = f"{columns.width.min()} x {columns.height.min()} to {columns.width.max()} x {columns.height.max()}"
    else:
        sides = "-"
    tiles = [
        (f"{facts.images:,}", "images"),
        (f"{len(facts.classes):,}", "classes"),
        (size(total), "encoded"),
        (sides, "pixels"),
    ]
    if training_split(facts).labelled:
        tiles.append((f"{training_split(facts).imbalance:.2f}", "imbalance"))
    return '<div class="tiles">' + "".join(f"<div><b>{value}</b>{what}</div>" for value, what in tiles) + "</div>"


def _advice(advice: list[Advice]) -> str:
    return "<ul>" + "".join(f'<li class="{item.level}">{_text(item.text)}</li>' for item in advice) + "</ul>"


def _splits(facts: Facts) -> str:
    rows = [
        (
            _text(split.name),
            f"{split.images:,}",
            size(split.bytes),
            f"{len(split.shard_samples):,}",
            f"{int((split.class_counts > 0).sum()):,}" if split.labelled else "no labels",
            channels(split.mean),
            channels(split.std),
        )
        for split in facts.splits
    ]
    return _table(("split", "images", "bytes", "shards", "classes", "mean R G B", "std R G B"), rows)


def _class_table(facts: Facts) -> str:
    labelled = [split for split in facts.splits if split.labelled]
    if not labelled:
        return ""
    rows = [
        (
            str(label),
            _text(name),
            *(f"{split.class_counts[label]:,}" for split in labelled),
            size(sum(int(split.class_bytes[label]) for split in labelled)),
        )
        for label, name in enumerate(facts.classes)
    ]
    table = _table(("label", "class", *(_text(split.name) for split in labelled), "bytes"), rows, words=2)
    opened = " open" if len(rows) <= 20 else ""
    return f"<details{opened}><summary>{len(rows):,} classes in numbers</summary>{table}</details>"


def _plots(plots: list[Plot], word: str) -> str:
    """The plots of the classes, or the other ones."""
    chosen = [plot for plot in plots if ("class" in plot.title) == bool(word)]
    return "".join(map(_plot, chosen))


def _plot(plot: Plot) -> str:
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{png_uri(plot.dark)}">'
    image = f'<img src="{png_uri(plot.light)}" alt="{html.escape(plot.alt)}">'
    return f"<figure><figcaption>{plot.title}</figcaption><picture>{dark}{image}</picture></figure>"


def _samples(facts: Facts, samples: list[tuple[int, Places]], album: Album) -> str:
    if not samples:
        return ""
    figures = "".join(
        f"<figure><figcaption>{_text(facts.classes[label])}</figcaption>"
        f'<img src="{album.sheet(places, 4)}" alt="samples of {_text(facts.classes[label])}"></figure>'
        for label, places in samples
    )
    rest = len(facts.classes) - len(samples)
    more = f"<p>{rest:,} more classes are not shown.</p>" if rest > 0 else ""
    few = " tiny" if max(len(places) for _, places in samples) <= 2 else ""
    return f'<div class="sheets{few}">{figures}</div>{more}'


def _images(facts: Facts) -> str:
    if not facts.images:
        return ""
    columns = facts.columns
    ratio = columns.width / columns.height
    rows = [
        (what, *(f"{value:,{form}}" for value in (values.min(), np.median(values), values.max())))
        for what, values, form in (
            ("width", columns.width, ".0f"),
            ("height", columns.height, ".0f"),
            ("width / height", ratio, ".2f"),
            ("bytes", columns.bytes, ".0f"),
        )
    ]
    kinds = [
        (_text(form), _text(channel), _text(split.name), f"{count:,}")
        for split in facts.splits
        for (form, channel), count in split.formats.most_common()
    ]
    return (
        '<div class="pair">'
        + _table(("", "smallest", "median", "largest"), rows)
        + _table(("format", "channels", "split", "images"), kinds, words=3)
        + "</div>"
    )


def _mean_image(facts: Facts) -> str:
    if not facts.images:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(facts.mean_image).resize((160, 160), Image.Resampling.NEAREST).save(buffer, "PNG")
    split = _text(facts.splits[0].name)
    image = f'<img class="mean" src="{png_uri(buffer.getvalue())}" alt="mean image of {split}">'
    return f"<figure><figcaption>Mean image of {split}, on a canvas of 32 x 32</figcaption>{image}</figure>"


def _extremes(facts: Facts, album: Album) -> str:
    figures = ""
    for title, places in facts.extremes.items():
        if not len(places):
            continue
        names = "".join(f"<li>{_caption(facts, int(place))}: {_text(album.name(int(place)))}</li>" for place in places)
        figures += (
            f"<figure><figcaption>{title}</figcaption>"
            f'<img src="{album.sheet(places, 4)}" alt="{title} images">'
            f"<details><summary>names</summary><ol>{names}</ol></details></figure>"
        )
    return f'<div class="sheets">{figures}</div>' if figures else ""


def _caption(facts: Facts, place: int) -> str:
    """Split, class, and the size where sizes differ."""
    columns = facts.columns
    label = int(columns.label[place])
    words = [facts.splits[int(columns.split[place])].name]
    words += [facts.classes[label]] if 0 <= label < len(facts.classes) else []
    words += [] if facts.uniform else [f"{columns.width[place]} x {columns.height[place]}"]
    return _text(", ".join(words))


def _pairs(facts: Facts, pairs: Places, album: Album) -> str:
    like = facts.likeness
    leaks = [
        (_text(leak.split), _text(leak.other), f"{leak.exact:,}", f"{leak.near:,}") for leak in facts.likeness.leaks
    ]
    table = _table(("images of", "that are also in", "same bytes", "look alike"), leaks, words=2) if leaks else ""
    if not len(pairs):
        return table + "<p>No two images have the same bytes or look alike.</p>"
    figures = "".join(
        f'<figure><img src="{album.sheet(pair)}" alt="two images that look alike">'
        f"<figcaption>{_caption(facts, int(pair[0]))}<br>{_caption(facts, int(pair[1]))}"
        f"<details><summary>names</summary>{_text(album.name(int(pair[0])))}<br>{_text(album.name(int(pair[1])))}</details>"
        "</figcaption></figure>"
        for pair in pairs
    )
    what = (
        f"<p>{like.copies:,} images repeat another byte for byte; {like.near:,} pairs of different bytes look alike"
        f" (pHash at most {like.radius} bits apart, details correlated by {like.least:.2f} or more), in"
        f" {len(like.groups):,} groups. One pair of a group is shown: first those whose labels differ, then those"
        " across splits.</p>"
    )
    return f'{table}{what}<div class="sheets small">{figures}</div>'


def _bad(facts: Facts) -> str:
    bad = [*((*row, "in the set, cannot be decoded") for row in facts.undecodable)]
    bad += [(*row, "left out") for row in facts.quarantined]
    if not bad:
        return ""
    rows = [(_text(split), _text(name), _text(reason), state) for split, name, reason, state in bad[:MAX_BAD_ROWS]]
    more = f"<p>{len(bad) - MAX_BAD_ROWS:,} more are in dataset.json.</p>" if len(bad) > MAX_BAD_ROWS else ""
    return _table(("split", "image", "why", ""), rows, words=4) + more
