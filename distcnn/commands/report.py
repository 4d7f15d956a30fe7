"""A page of a run, or of several side by side: curves, errors, speed, samples worth a look. One file, no network.

distcnn report runs/x                             writes runs/x/report.html, and its plots as runs/x/plots/*.png
distcnn report runs/x runs/y --output both.html   curves overlaid, settings that differ
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    """Of finished, running and dead runs; nothing that a run has written is changed."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    output: Path | None = None
    """The page to write; the plots of a single run go to plots/ beside it. If not given: report.html in the run folder,
    or here where there are several."""
    data: Path | None = None
    """Where the data set lies, if it is no longer where the runs had it."""


def run(options: Options) -> int:
    """Write the page, and of a single run its plots; 0."""
    from distcnn.errors import UserError
    from distcnn.files import write_atomically
    from distcnn.report.gather import gather
    from distcnn.report.page import page
    from distcnn.report.plots import FOLDER, draw, write_plots

    if not options.runs:
        raise UserError("name a run folder, such as runs/digits-cnn-seed0")
    name = "report.html"
    output = options.output or (options.runs[0] / name if len(options.runs) == 1 else Path(name))
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give the name of a page, such as {output / name}")
    runs = gather(options.runs, options.data)
    drawn = draw(runs)
    text = page(runs, drawn)
    try:
        write_atomically(output, text.encode("utf-8", "backslashreplace"))
        plots = write_plots(output.parent / FOLDER, drawn) if len(runs) == 1 else []
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; --output names another place") from error
    print(f"{output} written ({len(text) / 1e6:.1f} MB): open it in a browser")
    if plots:
        print(f"{len(plots)} plots in {plots[0].parent}")
    return 0
