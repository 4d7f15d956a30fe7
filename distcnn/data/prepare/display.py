"""What a person sees of it: progress while it works, and a table at the end."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from distcnn.data.prepare.build import Outcome

LINE_SECONDS = 10.0  # between lines where the output is no terminal


class Display:
    """A progress bar with images/s and the time left; a plain line now and then where nobody watches a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stage, self._begun, self._last = "", 0.0, time.monotonic()
        self._next_line = self._last + LINE_SECONDS
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` images of a stage; called often."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun = stage, self._last  # a stage begins where the one before it ended
        self._last, seconds = now, now - self._begun
        rate = f"{done / seconds:,.0f} images/s" if seconds > 0 else ""
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total, rate="")
            self._bar.update(self._tasks[stage], completed=done, rate=rate)
        elif now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            left = f", {(total - done) * seconds / done:,.0f} s left" if done and seconds > 0 else ""
            self.console.print(f"{stage}: {done:,} of {total:,} images, {rate}{left}", highlight=False)


def show(outcome: Outcome, output: str, console: Console) -> None:
    """The table of splits, what was left out and why, warnings, and what to do next."""
    manifest = outcome.manifest
    table = Table(title=f"{escape(manifest.name)}: {len(manifest.classes)} classes", title_justify="left")
    for heading in ("split", "images", "shards", "MB", "left out"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards) / 1e6
        bad = sum(row.split == name for row in manifest.quarantined)
        label = name if split.labelled else f"{name} (no labels)"
        table.add_row(label, f"{split.samples:,}", str(len(split.shards)), f"{size:,.1f}", str(bad))
    console.print(table)
    for row in manifest.quarantined[:5]:
        console.print(f"left out: {row.name}: {row.reason}", markup=False, highlight=False)
    if len(manifest.quarantined) > 5:
        console.print(f"... and {len(manifest.quarantined) - 5} more, all named in dataset.json", highlight=False)
    for line in outcome.warnings:
        console.print(f"warning: {line}", markup=False, highlight=False)
    images = sum(split.samples for split in manifest.splits.values())
    if outcome.made:
        rate = images / max(outcome.seconds, 1e-9)
        console.print(f"{images:,} images in {outcome.seconds:.1f} s ({rate:,.0f} images/s)", highlight=False)
    else:
        console.print("nothing to do: this very data set is there already", highlight=False)
    console.print(
        f"next: distcnn inspect {output}\n      distcnn train --data {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
