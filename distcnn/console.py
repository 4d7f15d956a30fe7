"""What a person sees: one live line per phase on a terminal, plain lines elsewhere, and the same lines in log.txt."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0  # between lines of progress where there is no terminal

Advance = Callable[[int, str], None]


def rich_console(highlight: bool = False, **how: Any) -> RichConsole:
    """rich's console, which takes stdout for a terminal only if it is one.

    Notebooks set FORCE_COLOR, at which rich alone would draw live bars into their cells, as escape codes.
    """
    return RichConsole(highlight=highlight, force_terminal=None if sys.stdout.isatty() else False, **how)


class Console:
    """Speaks on rank 0 only; other ranks have one that is silent (`speaks=False`)."""

    def __init__(self, speaks: bool, quiet: bool = False) -> None:
        self._rich = rich_console(soft_wrap=True, emoji=False)
        self._speaks, self._quiet = speaks, quiet
        self._log: Path | None = None

    def log_to(self, path: Path) -> None:
        """Repeat everything said from now on in a file."""
        if self._speaks:
            self._log = path

    def say(self, text: str) -> None:
        """A line for the person."""
        if self._speaks:
            self._write(text)
            if not self._quiet:
                self._print(text)

    def warn(self, text: str) -> None:
        """A line that is printed even with --quiet."""
        if self._speaks:
            self._write(f"warning: {text}")
            with contextlib.suppress(OSError):
                print(f"warning: {text}", file=sys.stderr, flush=True)

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Two columns: what, and its value."""
        if not self._speaks:
            return
        table = Table(title=Text(title), show_header=False, title_justify="left", title_style="bold")
        table.add_column(style="cyan")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
            self._write(f"{name}: {value}")
        if not self._quiet:
            self._print(table, soft_wrap=False)

    @contextlib.contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A phase of `total` units, `done` of them before. Yields advance(units, text to show)."""
        if not self._speaks or self._quiet:
            yield lambda units, text: None
        elif self._rich.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, TextColumn("{task.fields[text]}"), console=self._rich, transient=True) as bar:
                task = bar.add_task(title, total=total, completed=done, text="")
                yield lambda units, text: bar.update(task, advance=units, text=text)
        else:
            yield self._plain(title, total, done)

    def _plain(self, title: str, total: int, done: int) -> Advance:
        started = spoke = time.monotonic()
        begun = done

        def advance(units: int, text: str) -> None:
            nonlocal done, spoke
            done += units
            now = time.monotonic()
            if now - spoke >= PLAIN_SECONDS and done < total:
                spoke = now
                left = (now - started) / max(done - begun, 1) * (total - done)
                self._print(f"{title} {done}/{total}  {text}  {duration(left)} left")

        return advance

    def _print(self, what: str | Table, **how: Any) -> None:
        """To a terminal that may be gone, or a file on a full disk: neither is a reason to stop training."""
        with contextlib.suppress(OSError, SystemExit):  # rich leaves the program when a pipe is closed
            self._rich.print(what, markup=False, **how)

    def _write(self, text: str) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def duration(seconds: float) -> str:
    """1:02:03, or 4:05, or 6.7 s."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def percent(share: Any) -> str:
    """98.33 %."""
    return f"{100 * float(share):.2f} %"
