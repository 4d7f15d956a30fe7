"""inspect.html: what is known of a data set, on one page. Every name on it passes `text`."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from distcnn.data.inspect.advice import Advice, training_split
from distcnn.data.inspect.facts import Facts
from distcnn.data.inspect.pictures import Album, Places, pairs_to_show, samples_of_classes
from distcnn.page import document, figure, section, table, text, tiles
from distcnn.pictures import png_uri
from distcnn.plotting import Plot
from distcnn.text import channels, size

MAX_BAD_ROWS = 500


def page(facts: Facts, advice: list[Advice], plots: list[Plot], album: Album) -> str:
    """The whole page as text."""
    pairs = pairs_to_show(facts)
    samples = samples_of_classes(facts, training_split(facts).name)
    album.load(np.concatenate([*facts.extremes.values(), pairs.reshape(-1), *(places for _, places in samples)]))
    sections = [
        section("What to do", _advice(advice)),
        section("Splits", _splits(facts)),
        section("Classes", f'<div class="pair">{_plots(plots, "class")}{_class_table(facts)}</div>'),
        section("Samples", _samples(facts, samples, album)),
        section("Images", _images(facts) + f'<div class="plots">{_plots(plots, "")}{_mean_image(facts)}</div>'),
        section("Extremes", _extremes(facts, album)),
        section("Look-alikes", _pairs(facts, pairs, album)),
        section("Left out", _bad(facts)),
    ]
    return document(facts.name, "inspect", _tiles(facts), sections)


def _tiles(facts: Facts) -> str:
    total = sum(split.bytes for split in facts.splits)
    columns = facts.columns
    if facts.uniform:
        sides = f"{facts.uniform[0]} x {facts.uniform[1]}"
    elif facts.images:
        sides = f"{columns.width.min()} x {columns.height.min()} to {columns.width.max()} x {columns.height.max()}"
    else:
        sides = "-"
    values = [
        (f"{facts.images:,}", "images"),
        (f"{len(facts.classes):,}", "classes"),
        (size(total), "encoded"),
        (sides, "pixels"),
    ]
    if training_split(facts).labelled:
        values.append((f"{training_split(facts).imbalance:.2f}", "imbalance"))
    return tiles(values)


def _advice(advice: list[Advice]) -> str:
    return "<ul>" + "".join(f'<li class="{item.level}">{text(item.text)}</li>' for item in advice) + "</ul>"


def _splits(facts: Facts) -> str:
    rows = [
        (
            text(split.name),
            f"{split.images:,}",
            size(split.bytes),
            f"{len(split.shard_samples):,}",
            f"{int((split.class_counts > 0).sum()):,}" if split.labelled else "no labels",
            channels(split.mean),
            channels(split.std),
        )
        for split in facts.splits
    ]
    return table(("split", "images", "bytes", "shards", "classes", "mean R G B", "std R G B"), rows)


def _class_table(facts: Facts) -> str:
    labelled = [split for split in facts.splits if split.labelled]
    if not labelled:
        return ""
    rows = [
        (
            str(label),
            text(name),
            *(f"{split.class_counts[label]:,}" for split in labelled),
            size(sum(int(split.class_bytes[label]) for split in labelled)),
        )
        for label, name in enumerate(facts.classes)
    ]
    numbers = table(("label", "class", *(text(split.name) for split in labelled), "bytes"), rows, words=2)
    opened = " open" if len(rows) <= 20 else ""
    return f"<details{opened}><summary>{len(rows):,} classes in numbers</summary>{numbers}</details>"


def _plots(plots: list[Plot], word: str) -> str:
    """The plots of the classes, or the other ones."""
    chosen = [plot for plot in plots if ("class" in plot.title) == bool(word)]
    return "".join(map(figure, chosen))


def _samples(facts: Facts, samples: list[tuple[int, Places]], album: Album) -> str:
    if not samples:
        return ""
    figures = "".join(
        f"<figure><figcaption>{text(facts.classes[label])}</figcaption>"
        f'<img src="{album.sheet(places, 4)}" alt="samples of {text(facts.classes[label])}"></figure>'
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
        (text(form), text(channel), text(split.name), f"{count:,}")
        for split in facts.splits
        for (form, channel), count in split.formats.most_common()
    ]
    return (
        '<div class="pair">'
        + table(("", "smallest", "median", "largest"), rows)
        + table(("format", "channels", "split", "images"), kinds, words=3)
        + "</div>"
    )


def _mean_image(facts: Facts) -> str:
    if not facts.images:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(facts.mean_image).resize((160, 160), Image.Resampling.NEAREST).save(buffer, "PNG")
    split = text(facts.splits[0].name)
    image = f'<img class="mean" src="{png_uri(buffer.getvalue())}" alt="mean image of {split}">'
    return f"<figure><figcaption>Mean image of {split}, on a canvas of 32 x 32</figcaption>{image}</figure>"


def _extremes(facts: Facts, album: Album) -> str:
    figures = ""
    for title, places in facts.extremes.items():
        if not len(places):
            continue
        names = "".join(f"<li>{_caption(facts, int(place))}: {text(album.name(int(place)))}</li>" for place in places)
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
    return text(", ".join(words))


def _pairs(facts: Facts, pairs: Places, album: Album) -> str:
    like = facts.likeness
    leaks = [(text(leak.split), text(leak.other), f"{leak.exact:,}", f"{leak.near:,}") for leak in facts.likeness.leaks]
    leaked = table(("images of", "that are also in", "same bytes", "look alike"), leaks, words=2) if leaks else ""
    if not len(pairs):
        return leaked + "<p>No two images have the same bytes or look alike.</p>"
    figures = "".join(
        f'<figure><img src="{album.sheet(pair)}" alt="two images that look alike">'
        f"<figcaption>{_caption(facts, int(pair[0]))}<br>{_caption(facts, int(pair[1]))}"
        f"<details><summary>names</summary>{text(album.name(int(pair[0])))}<br>{text(album.name(int(pair[1])))}</details>"
        "</figcaption></figure>"
        for pair in pairs
    )
    what = (
        f"<p>{like.copies:,} images repeat another byte for byte; {like.near:,} pairs of different bytes look alike"
        f" (pHash at most {like.radius} bits apart, details correlated by {like.least:.2f} or more), in"
        f" {len(like.groups):,} groups. One pair of a group is shown: first those whose labels differ, then those"
        " across splits.</p>"
    )
    return f'{leaked}{what}<div class="sheets small">{figures}</div>'


def _bad(facts: Facts) -> str:
    bad = [*((*row, "in the set, cannot be decoded") for row in facts.undecodable)]
    bad += [(*row, "left out") for row in facts.quarantined]
    if not bad:
        return ""
    rows = [(text(split), text(name), text(reason), state) for split, name, reason, state in bad[:MAX_BAD_ROWS]]
    more = f"<p>{len(bad) - MAX_BAD_ROWS:,} more are in dataset.json.</p>" if len(bad) > MAX_BAD_ROWS else ""
    return table(("split", "image", "why", ""), rows, words=4) + more
