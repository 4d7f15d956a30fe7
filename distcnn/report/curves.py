"""The curves of one run or of several, over samples seen: the axis on which runs of any batch size compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from distcnn.plotting import Draw, Plot, Style, drawable, plot
from distcnn.report.gather import Numbers, RunFacts
from distcnn.times import RankTimes

HEIGHT = 2.8  # inches
MAX_POINTS = 600  # of a line; of more, neighbours are averaged
PARTS_SHOWN = ("wait", "read", "decode", "resize", "collate", "transfer")
MAX_RANKS = 32  # drawn
PART_NAMES = {"data": "waits for data", "augment": "augments", "compute": "computes", "reduce": "sums, steps"}
LEAST_SHARE = 0.002  # parts below it in the mean are not drawn


def curves(runs: Sequence[RunFacts]) -> list[Plot]:
    """Loss, top-1, learning rate and gradient norm; only what the runs have."""
    several = len(runs) > 1
    how = " (faint: training, strong: validation)" if several else ""
    drawn = [
        _plot(f"Loss{how}", _loss(runs), runs, ("train/loss", "val/loss"), "loss"),
        _plot("Top-1 of the validation split, with 95 % intervals", _top1(runs), runs, ("val/top1",), "top1"),
        _plot("Learning rate", _line(runs, "train/lr", "learning rate"), runs, ("train/lr",), "learning_rate"),
        _plot(
            "Gradient norm",
            _line(runs, "train/grad_norm", "L2 norm", log=True),
            runs,
            ("train/grad_norm",),
            "gradient_norm",
        ),
    ]
    return [found for found in drawn if found]


def speed(runs: Sequence[RunFacts]) -> list[Plot]:
    """Throughput; and of a single run, where the time went and how the slowest rank compares."""
    column = "perf/images_per_second"
    title = "Images per second in training"
    found = [_plot(title, _line(runs, column, "images/s", floor=0), runs, (column,), "speed")]
    title = "MFU: the network's own arithmetic, as a share of the GPUs' peak"
    found.append(_plot(title, _line(runs, "perf/mfu", "share of the peak", floor=0), runs, ("perf/mfu",), "mfu"))
    if len(runs) == 1:
        found.append(_rank_times(runs[0]))
        shares = {part: share for part, share in runs[0].shares().items() if share >= LEAST_SHARE}
        if shares:
            title = "Loading: seconds of each part for each second of training"
            found.append(_plot(title, _shares(runs[0], list(shares)), runs, ("perf/wait_share",), "loading"))
        title = "Seconds a step of the slowest rank, and the median of the others"
        found.append(_plot(title, _ranks(runs[0]), runs, ("perf/slowest_step_seconds",), "slowest_rank"))
    return [plot for plot in found if plot]


def _plot(title: str, draw: Draw, runs: Sequence[RunFacts], columns: Sequence[str], name: str) -> Plot | None:
    """None where no run has any of the columns."""
    if not any(len(run.series(column)[0]) for run in runs for column in columns):
        return None

    def whole(axes: Any, style: Style) -> None:
        draw(axes, style)
        axes.set_xlabel("samples seen")
        axes.xaxis.set_major_formatter(lambda value, _: samples_text(value))
        axes.set_xlim(left=0)

    return plot(title, f"{title}, over samples seen", whole, HEIGHT, name)


def _rank_times(run: RunFacts) -> Plot | None:
    """Where the time of each rank's steps went; of many ranks, of those that the others wait for."""
    ranks = sorted(run.times, key=lambda rank: rank.share("reduce"))[:MAX_RANKS]
    if not ranks:
        return None
    ranks.sort(key=lambda rank: rank.rank)
    some = f" (the {MAX_RANKS} that wait least for others)" if len(run.times) > MAX_RANKS else ""
    title = f"Where the time of the steps went, by rank{some}"
    return plot(title, title, _bars(ranks), 1.0 + 0.27 * max(len(ranks), 2), "time_by_rank")


def _bars(ranks: Sequence[RankTimes]) -> Draw:
    def draw(axes: Any, style: Style) -> None:
        places, left = np.arange(len(ranks)), np.zeros(len(ranks))
        for number, (part, said) in enumerate(PART_NAMES.items()):
            width = np.array([100 * rank.share(part) for rank in ranks])
            axes.barh(places, width, 0.72, left=left, color=style.color(number), alpha=0.85, label=said)
            left += width
        axes.set_yticks(places, [f"rank {rank.rank}" for rank in ranks])
        axes.set_ylim(len(ranks) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the seconds of its steps")

    return draw


def _loss(runs: Sequence[RunFacts]) -> Draw:
    def draw(axes: Any, style: Style) -> None:
        for number, run in enumerate(runs):
            train, val = thinned(*run.series("train/loss")), run.series("val/loss")
            if len(runs) == 1:
                axes.plot(*train, color=style.color(0), linewidth=1.4, label="train")
                axes.plot(*val, color=style.color(1), linewidth=1.8, label="val", **_marks(val))
                continue
            color, name = style.color(number), drawable(run.name, number)
            axes.plot(*train, color=color, linewidth=1.0, alpha=0.4)
            axes.plot(*val, color=color, linewidth=1.8, label=name, **_marks(val))
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)

    return draw


def _top1(runs: Sequence[RunFacts]) -> Draw:
    def draw(axes: Any, style: Style) -> None:
        for number, run in enumerate(runs):
            seen, top1 = run.series("val/top1")
            low, high = run.series("val/top1_low")[1], run.series("val/top1_high")[1]
            color = style.color(number)
            if len(low) == len(high) == len(seen):
                axes.fill_between(seen, 100 * low, 100 * high, color=color, alpha=0.18, linewidth=0)
            marks = _marks((seen, top1))
            axes.plot(seen, 100 * top1, color=color, linewidth=1.8, label=drawable(run.name, number), **marks)
        axes.set_ylabel("%")

    return draw


def _line(runs: Sequence[RunFacts], column: str, unit: str, log: bool = False, floor: float | None = None) -> Draw:
    def draw(axes: Any, style: Style) -> None:
        for number, run in enumerate(runs):
            points = thinned(*run.series(column))
            label = drawable(run.name, number)
            axes.plot(*points, color=style.color(number), linewidth=1.4, label=label, **_marks(points))
        axes.set_ylabel(unit)
        if log and all((run.series(column)[1] > 0).all() for run in runs):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        elif floor is not None:
            axes.set_ylim(bottom=floor)

    return draw


def _shares(run: RunFacts, parts: Sequence[str]) -> Draw:
    def draw(axes: Any, style: Style) -> None:
        for part in parts:
            points = thinned(*run.series(f"perf/{part}_share"))
            color = style.color(PARTS_SHOWN.index(part))
            dashes = "--" if PARTS_SHOWN.index(part) >= len(style.series) else "-"
            axes.plot(*points, color=color, linewidth=1.4, linestyle=dashes, label=part, **_marks(points))
        axes.set_ylabel("s / s" if len(parts) > 1 else f"{parts[0]}, s / s")
        axes.set_ylim(bottom=0)

    return draw


def _ranks(run: RunFacts) -> Draw:
    def draw(axes: Any, style: Style) -> None:
        for number, (column, name) in enumerate((("slowest", "slowest rank"), ("other", "median of the others"))):
            points = thinned(*run.series(f"perf/{column}_step_seconds"))
            axes.plot(*points, color=style.color(number), linewidth=1.4, label=name, **_marks(points))
        axes.set_ylabel("s")
        axes.set_ylim(bottom=0)

    return draw


def _marks(points: tuple[Numbers, Numbers]) -> dict[str, Any]:
    """Dots where there are few points: a single one makes no line."""
    return {"marker": "o", "markersize": 3.5} if len(points[0]) <= 30 else {}


def thinned(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """At most MAX_POINTS points: means of neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    parts = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(parts, len(x)))
    return np.add.reduceat(x, parts) / counts, np.add.reduceat(y, parts) / counts


def samples_text(value: float) -> str:
    """1,500 as 1.5k, 2,000,000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
