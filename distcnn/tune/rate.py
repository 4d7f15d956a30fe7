"""The learning-rate range test: train while the rate rises, see where the loss falls and where it breaks.

Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from distcnn.data.loader import Tile, training_requests
from distcnn.job import Job
from distcnn.plotting import Style, picture
from distcnn.train import epoch_order, train_step

DIVERGED = 4.0  # times the lowest smoothed loss so far
FALL = 0.05  # less of a fall than this share says nothing
RISE = 1 / 3  # of the fall: so far the loss may rise again and still counts as low
RULE = "a tenth of the rate at which the loss leaves its lowest values"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RangeTest:
    """Rates and the losses of the steps made with them; `diverged` where it ended before the highest rate."""

    rates: Floats
    losses: Floats
    diverged: bool

    @property
    def smoothed(self) -> Floats:
        """The losses, averaged with their neighbours on both sides (Gaussian), so that nothing moves along the axis."""
        return smooth(self.losses)

    @property
    def lowest(self) -> float:
        """The rate at the lowest smoothed loss."""
        return float(self.rates[int(self.smoothed.argmin())])

    @property
    def steepest(self) -> float:
        """The rate before it at which the smoothed loss falls fastest over the logarithm of the rate."""
        slope = np.gradient(self.smoothed, np.log(self.rates))
        return float(self.rates[int(slope[: int(self.smoothed.argmin()) + 1].argmin())])

    @property
    def edge(self) -> float:
        """The first rate beyond `lowest` at which the smoothed loss has risen by RISE of its fall, or the last rate.

        The lowest loss itself is often one of many on a plateau, whose noise would choose.
        """
        curve, low = self.smoothed, int(self.smoothed.argmin())
        high = np.flatnonzero(curve[low:] > curve[low] + RISE * self.fall)
        return float(self.rates[low + int(high[0])] if len(high) else self.rates[-1])

    @property
    def fall(self) -> float:
        """From the highest smoothed loss before the lowest one, to that."""
        curve, low = self.smoothed, int(self.smoothed.argmin())
        return float(curve[: low + 1].max() - curve[low])

    @property
    def suggestion(self) -> float | None:
        """By RULE, with two digits; None where the loss hardly fell."""
        enough = self.fall > FALL * (self.smoothed.min() + self.fall)
        return float(f"{self.edge / 10:.1e}") if enough else None


def smooth(losses: Floats) -> Floats:
    """(n,) -> (n,): Gaussian mean with a standard deviation of a fortieth of them, at least one step."""
    sigma = max(len(losses) / 40, 1.0)
    places = np.arange(len(losses))
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / sigma) ** 2)
    mean: Floats = (weights @ losses) / weights.sum(1)
    return mean


def range_test(
    job: Job, steps: int, low: float, high: float, advance: Callable[[int, str], None] = lambda units, text: None
) -> RangeTest:
    """Train for up to `steps` steps with rates from `low` to `high`, evenly in their logarithm.

    Ends when the loss is not finite, or its running mean (of the last steps) is DIVERGED times the lowest one.
    """
    rates, losses, diverged = np.geomspace(low, high, steps), [], False
    best, mean = math.inf, 0.0
    for number, (tiles, samples) in zip(range(steps), _endless(job), strict=False):
        loss, norm, _ = train_step(job, tiles, samples, float(rates[number]))
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm.item()):
            diverged = True
            break
        losses.append(value)
        recent = losses[-max(steps // 20, 1) :]
        mean = sum(recent) / len(recent)
        best = min(best, mean)
        advance(1, f"rate {rates[number]:.1e}  loss {value:.3f}")
        if mean > DIVERGED * best:
            diverged = True
            break
    return RangeTest(rates[: len(losses)], np.array(losses), diverged)


def _endless(job: Job) -> Iterator[tuple[list[Tile], int]]:
    """(tiles, samples) of the steps of epoch 0, 1, ...: what the run itself would be given."""
    lanes = range(job.config.geometry.lanes)
    epoch = 0
    while True:
        order = epoch_order(job, epoch)
        for step, tiles in enumerate(job.loader.steps(training_requests(order, lanes))):
            yield tiles, sum(order.tile_sizes(step))
            job.position = job.position.advance(sum(order.tile_sizes(step)))
        job.position = job.position.next_epoch()
        epoch += 1


def draw(found: RangeTest, own: float) -> bytes:
    """PNG bytes: the losses over the rate (a point a step, smoothed), with what is suggested and the config's rate."""

    def curve(axes: Any, style: Style) -> None:
        axes.scatter(found.rates, found.losses, 7, color=style.faint)
        axes.plot(found.rates, found.smoothed, color=style.color(0))
        marks = [("suggested", found.suggestion, 2, "-"), ("edge", found.edge, 1, ":"), ("--lr", own, 4, "--")]
        for name, rate, number, line in marks:
            if rate is not None and found.rates[0] <= rate <= found.rates[-1]:
                axes.axvline(rate, color=style.color(number), linestyle=line, label=f"{name} {rate:.1e}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:.0e}")
        axes.xaxis.set_minor_locator(NullLocator())
        low, margin = found.smoothed.min(), 0.2 * max(found.fall, 0.05 * found.smoothed.min())
        axes.set_ylim(low - margin, low + found.fall + 2.5 * margin)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")

    return picture(curve, 3.2, transparent=False)
