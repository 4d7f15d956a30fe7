"""Loss and speed between two rows of metrics, and over the whole of a process's life."""

from __future__ import annotations

import math
import time

import torch

from distcnn.data.loader import PARTS, LoaderStats


class Meter:
    """Counts samples and time spent in training (not in evaluations). Losses stay on the device until a row is due."""

    def __init__(self, stats: LoaderStats) -> None:
        self._stats = stats
        self._losses: list[torch.Tensor] = []
        self._samples, self._seconds = 0, 0.0
        self._spent = dict.fromkeys(PARTS, 0.0)
        self.total_samples, self.total_seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """Training begins, or goes on after something else."""
        self._at = time.perf_counter()
        self._spent_at = self._stats.seconds()

    def stop(self) -> None:
        """Something else begins."""
        now = time.perf_counter()
        self._seconds += now - self._at
        self.total_seconds += now - self._at
        for part, total in self._stats.seconds().items():
            self._spent[part] += total - self._spent_at[part]
        self.start()

    def add(self, loss: torch.Tensor, samples: int) -> None:
        """A step was made: its mean loss, a scalar on the device, and its samples over all ranks."""
        self._losses.append(loss)
        self._samples += samples
        self.total_samples += samples

    def settle(self, losses: list[float]) -> None:
        """Move what was added into `losses` (sum, number of steps): waits for the device.

        A loss that is not finite is left out, as its step was.
        """
        for value in torch.stack(self._losses).tolist() if self._losses else []:
            if math.isfinite(value):
                losses[0] += value
                losses[1] += 1
        self._losses.clear()

    def row(self, losses: list[float]) -> dict[str, float]:
        """The means since the last row, and a new beginning of `losses` and the clock.

        perf/<part>_share: seconds of it for each second of the run; parts that threads do together can pass 1.
        """
        self.settle(losses)
        self.stop()
        seconds = max(self._seconds, 1e-9)
        values = {
            "train/loss": losses[0] / losses[1] if losses[1] else math.nan,
            "perf/images_per_second": self._samples / seconds,
            **{f"perf/{part}_share": spent / seconds for part, spent in self._spent.items()},
        }
        losses[:] = [0.0, 0.0]
        self._samples, self._seconds = 0, 0.0
        self._spent = dict.fromkeys(PARTS, 0.0)
        return values
