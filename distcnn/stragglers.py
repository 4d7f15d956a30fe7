"""Which rank the others wait for: each rank's own time per step, without the time in which it waits for others.

The numbers travel with a sum that every step makes anyway, R pairs of float64, so all ranks know all of them.
R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SLOWER = 1.5  # times the median of the others: then a rank is named
LEAST_SECONDS = 0.005  # a step: smaller differences are noise
LEAST_STEPS = 20
EVERY_SECONDS = 60.0  # between two lines about it


class Stragglers:
    """Seconds per step that each rank waits for data and computes, since the last row of metrics and the last line."""

    def __init__(self, rank: int, size: int, warn: Callable[[str], None]) -> None:
        self.rank, self.size, self._warn = rank, size, warn
        self._row = torch.zeros(0)
        self._window, self._row_steps, self._window_steps = torch.zeros(2 * size, dtype=torch.float64), 0, 0
        self._spoke: float | None = None

    @property
    def length(self) -> int:
        """Of the vector that is summed: 0 for a single rank."""
        return 2 * self.size if self.size > 1 else 0

    def mine(self, data_seconds: float, compute_seconds: float) -> torch.Tensor:
        """(length,) float64: this rank's seconds in its place, zeros elsewhere."""
        values = torch.zeros(self.length, dtype=torch.float64)
        if self.size > 1:
            values[2 * self.rank], values[2 * self.rank + 1] = data_seconds, compute_seconds
        return values

    def add(self, totals: torch.Tensor) -> None:
        """(length,) float64 of a step, summed over the ranks, on the device: nobody waits for it here."""
        if self.size > 1:
            self._row = totals.clone() if not self._row_steps else self._row + totals
            self._row_steps += 1

    def row(self) -> dict[str, float]:
        """Columns of metrics: the slowest rank since the last row, its seconds per step, and the others' median."""
        if self.size == 1 or not self._row_steps:
            return {}
        sums = self._row.cpu()
        self._window += sums
        self._window_steps += self._row_steps
        slowest, its, others = _slowest(sums / self._row_steps)
        self._row_steps = 0
        self._speak()
        return {"perf/slowest_rank": slowest, "perf/slowest_step_seconds": its, "perf/other_step_seconds": others}

    def _speak(self) -> None:
        """Name a straggler, at most once in EVERY_SECONDS, for the steps since the last look."""
        now = time.monotonic()
        if self._window_steps < LEAST_STEPS or (self._spoke is not None and now - self._spoke < EVERY_SECONDS):
            return
        means = self._window / self._window_steps
        slowest, its, others = _slowest(means)
        if its > SLOWER * others and its - others > LEAST_SECONDS:
            data, compute = means[2 * slowest].item(), means[2 * slowest + 1].item()
            what = "waiting for data" if data > compute else "computing"
            self._warn(
                f"rank {slowest} is slow: {its:.3f} s a step by itself, mostly {what}, where the others take"
                f" {others:.3f} s (median of {self._window_steps} steps); all wait for it"
            )
        self._spoke = now
        self._window.zero_()
        self._window_steps = 0


def _slowest(means: torch.Tensor) -> tuple[int, float, float]:
    """(the slowest rank, its seconds, the median of the others) of (2R,) seconds a step."""
    own = means.view(-1, 2).sum(1)
    slowest = int(own.argmax())
    others = torch.cat([own[:slowest], own[slowest + 1 :]])
    return slowest, own[slowest].item(), others.quantile(0.5).item()
