"""What is printed: the facts as tables, the advice as lines."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distcnn.data.inspect.advice import Advice
from distcnn.data.inspect.facts import Facts
from distcnn.text import channels, shown, size

MAX_CLASS_ROWS = 30
MAX_BAD_ROWS = 10
BAR = 24
MARKS = {"warning": ("!", "bold red"), "notice": ("-", "yellow"), "good": ("+", "green")}


def print_tables(facts: Facts, advice: list[Advice], console: Console) -> None:
    """Print everything. Names are never read as markup."""
    console.print(_splits(facts))
    if any(split.labelled for split in facts.splits):
        console.print(_classes(facts))
    console.print(_images(facts))
    bad = [*facts.undecodable, *facts.quarantined]
    if bad:
        console.print(_bad(bad))
    for item in advice:
        mark, style = MARKS[item.level]
        console.print(Text(f"{mark} ", style=style) + Text(shown(item.text), style=""))


def _table(title: str, *headers: str) -> Table:
    """The first column holds names, the others numbers."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", header_style="cyan")
    for number, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if number == 0 else "right", overflow="fold")
    return table


def _splits(facts: Facts) -> Table:
    table = _table(shown(facts.name), "split", "images", "bytes", "shards", "classes", "mean R G B", "std R G B")
    for split in facts.splits:
        held = int((split.class_counts > 0).sum())
        table.add_row(
            Text(shown(split.name)),
            f"{split.images:,}",
            size(split.bytes),
            f"{len(split.shard_samples):,}",
            f"{held:,}" if split.labelled else "no labels",
            channels(split.mean),
            channels(split.std),
        )
    return table


def _classes(facts: Facts) -> Table:
    """Classes by label; of many, the largest and the smallest ones."""
    labelled = [split for split in facts.splits if split.labelled]
    total = np.sum([split.class_counts for split in labelled], axis=0)
    chosen = list(range(len(facts.classes)))
    title = f"{len(facts.classes):,} classes"
    if len(chosen) > MAX_CLASS_ROWS:
        order = np.argsort(-total, kind="stable").tolist()
        chosen = [*order[: MAX_CLASS_ROWS // 2], *order[-(MAX_CLASS_ROWS // 2) :]]
        title += f", the {MAX_CLASS_ROWS // 2} largest and smallest"
    table = _table(title, "class", *(shown(split.name) for split in labelled), "bytes", "")
    table.columns[-1].justify = "left"
    for label in chosen:
        bar = "█" * round(BAR * total[label] / max(1, total.max()))
        counts = (f"{split.class_counts[label]:,}" for split in labelled)
        held = size(sum(int(split.class_bytes[label]) for split in labelled))
        table.add_row(Text(shown(facts.classes[label])), *counts, held, Text(bar, style="blue"))
    return table


def _images(facts: Facts) -> Table:
    table = _table("Images", "what", "smallest", "median", "largest")
    columns = facts.columns
    if facts.images:
        for name, values in (("width", columns.width), ("height", columns.height), ("bytes", columns.bytes)):
            table.add_row(name, *(f"{value:,.0f}" for value in (values.min(), np.median(values), values.max())))
        ratio = columns.width / columns.height
        table.add_row("width / height", *(f"{value:.2f}" for value in (ratio.min(), np.median(ratio), ratio.max())))
    kinds: dict[tuple[str, str], int] = {}
    for split in facts.splits:
        for kind, count in split.formats.items():
            kinds[kind] = kinds.get(kind, 0) + count
    for (form, channel), count in sorted(kinds.items(), key=lambda item: -item[1]):
        table.add_row(Text(f"{form} {channel}"), "", f"{count:,} images", "")
    return table


def _bad(bad: list[tuple[str, str, str]]) -> Table:
    title = f"{len(bad):,} images that cannot be used" + (", the first ones" if len(bad) > MAX_BAD_ROWS else "")
    table = _table(title, "split", "image", "why")
    for column in table.columns:
        column.justify = "left"
    for split, name, reason in bad[:MAX_BAD_ROWS]:
        table.add_row(Text(shown(split)), Text(shown(name)), Text(shown(reason)))
    return table
