"""The plots of a report: drawn once, for the page and for the files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distcnn import charts
from distcnn.console import percent
from distcnn.files import write_atomically
from distcnn.outcome import Outcome
from distcnn.plotting import Plot, as_file, plot
from distcnn.report.curves import curves, speed
from distcnn.report.gather import RunFacts
from distcnn.report.network import network

FOLDER = "plots"


@dataclass(frozen=True)
class Drawn:
    """All plots of a page: over all runs, then by run. `networks`: (drawing, sentences as HTML)."""

    curves: list[Plot]
    speed: list[Plot]
    evaluations: list[list[Plot]]
    networks: list[tuple[Plot, str] | None]

    def __iter__(self) -> Iterator[Plot]:
        yield from (*self.curves, *self.speed)
        for plots, layers in zip(self.evaluations, self.networks, strict=True):
            yield from (*plots, *([layers[0]] if layers else ()))


def draw(runs: Sequence[RunFacts]) -> Drawn:
    """Draw what the runs have."""
    evaluations = [evaluation(run.last) if run.last else [] for run in runs]
    return Drawn(curves(runs), speed(runs), evaluations, [network(run) for run in runs])


def evaluation(found: Outcome) -> list[Plot]:
    """Confusion matrix (of few classes), recall of each class, reliability."""
    few, classes = len(found.classes) <= charts.MAX_CLASSES, len(found.classes)
    bars = "Recall of each class" if few else f"Recall of the {charts.MAX_CLASSES} weakest classes"
    plots = []
    if few:
        title = "Confusion matrix: rows are true classes, colours their shares"
        plots.append(plot(title, title, charts.confusion(found), charts.confusion_height(classes), "confusion"))
    plots.append(plot(bars, bars, charts.class_bars(found), charts.class_height(classes), "recall"))
    if found.bins:
        title = f"Reliability (expected calibration error {percent(found.summary['calibration_error'])})"
        plots.append(plot(title, title, charts.reliability(found), 3.2, "reliability"))
    return plots


def write_plots(folder: Path, drawn: Drawn) -> list[Path]:
    """Write the plots of a single run as PNG files into `folder`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for found in drawn:
        written.append(folder / f"{found.name}.png")
        write_atomically(written[-1], as_file(found))
    return written
