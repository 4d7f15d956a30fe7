"""Where each rank's time goes: shares in the rows of metrics, and logs/times_<rank>.jsonl, a row an epoch.

Each rank writes its own file, so no rank waits for another. Seconds are the host's: on a GPU, whose kernels run on
their own, they say what the host waited for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distcnn.heartbeat import COMPUTE, DATA, REDUCE, Pulse
from distcnn.runfolder import read_rows

if TYPE_CHECKING:  # `distcnn status` reads times without importing torch
    from distcnn.data.loader import LoaderStats

# Of a step, one after the other; together they are its whole time. reduce: the backward pass of the rank's last tile,
# the sums over the ranks and what is waited for there, the optimizer.
PARTS = ("data", "augment", "compute", "reduce")
LOADING = ("read", "decode", "resize", "collate", "transfer")  # beside them, in threads


class Times:
    """Adds up a rank's seconds by part. `augment_seconds` is what the training step adds to."""

    def __init__(self, pulse: Pulse, stats: LoaderStats) -> None:
        self._pulse, self._stats = pulse, stats
        self.augment_seconds = 0.0
        self._of_row = self._of_epoch = self._totals()

    def shares(self) -> dict[str, float]:
        """Columns of metrics: parts of the seconds since the last call. The data's is perf/wait_share already."""
        now = self._totals()
        spent = {part: now[part] - self._of_row[part] for part in PARTS}
        self._of_row = now
        whole = max(sum(spent.values()), 1e-9)
        return {f"perf/{part}_share": spent[part] / whole for part in PARTS if part != "data"}

    def row(self) -> dict[str, float]:
        """Seconds of each part since the last call; `at`: seconds since 1970."""
        now = self._totals()
        found = {part: round(seconds - self._of_epoch[part], 6) for part, seconds in now.items()}
        self._of_epoch = now
        return {"at": round(time.time(), 3)} | found

    def _totals(self) -> dict[str, float]:
        spent, loading = self._pulse.all_seconds(), self._stats.seconds()
        step = {"data": spent[DATA], "augment": self.augment_seconds, "reduce": spent[REDUCE]}
        return step | {"compute": spent[COMPUTE] - self.augment_seconds} | {part: loading[part] for part in LOADING}


def file_of(rank: int) -> str:
    """The file of a rank's times, from the run folder on."""
    return f"logs/times_{rank}.jsonl"


@dataclass(frozen=True)
class RankTimes:
    """Seconds by part of a rank, over all that it has written."""

    rank: int
    seconds: Mapping[str, float]

    @property
    def whole(self) -> float:
        """Seconds of all its steps."""
        return sum(self.seconds[part] for part in PARTS)

    def share(self, part: str) -> float:
        """Seconds of a part for each second of its steps; of what threads do together, it can pass 1."""
        return self.seconds[part] / max(self.whole, 1e-9)


def read_times(run: Path) -> list[RankTimes]:
    """The times of a run's ranks, by rank; of the starts on as many processes as the last one. [] if there are none."""
    paths = [path for path in (run / "logs").glob("times_*.jsonl") if path.stem.split("_")[1].isdecimal()]
    rows = {int(path.stem.split("_")[1]): [row for row in read_rows(path) if "at" in row] for path in paths}
    last = max((row for of_rank in rows.values() for row in of_rank), key=lambda row: float(row["at"]), default={})
    found = []
    for rank, of_rank in sorted(rows.items()):
        mine = [row for row in of_rank if row["size"] == last["size"]]
        seconds = {part: sum(float(row.get(part, 0.0)) for row in mine) for part in (*PARTS, *LOADING)}
        if mine:
            found.append(RankTimes(rank, seconds))
    return found
