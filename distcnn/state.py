"""Where a run stands: a few integers, from which everything random and everything that comes next follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from distcnn.data.keyed import full_digest, ids_digest
from distcnn.data.order import ORDER_VERSION, Geometry, Ids, every_time
from distcnn.errors import UserError

STATE_VERSION = 1


@dataclass(frozen=True)
class Position:
    """Steps made so far: `step` within `epoch`, `total` over the run, `samples` over the run.

    It moves when the optimizer has stepped, never when a batch is fetched.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        if min(self.epoch, self.step, self.total, self.samples) < 0:
            raise ValueError(f"a position counts from 0: {self}")

    def advance(self, samples: int) -> Position:
        return replace(self, step=self.step + 1, total=self.total + 1, samples=self.samples + samples)

    def next_epoch(self) -> Position:
        return replace(self, epoch=self.epoch + 1, step=0)


@dataclass(frozen=True)
class Identity:
    """What a position means something for: another data set, seed or cut of the batch is another run."""

    fingerprint: str
    seed: int
    global_batch: int
    tile: int
    window_shards: int
    version: int = STATE_VERSION
    order_version: int = ORDER_VERSION

    @staticmethod
    def of(fingerprint: str, seed: int, geometry: Geometry, window_shards: int) -> Identity:
        return Identity(fingerprint, seed, geometry.global_batch, geometry.tile, window_shards)

    def check(self, saved: Mapping[str, Any], where: str) -> None:
        """Raises UserError with the first difference if `saved`, an Identity as a dict, is not this one."""
        for name, mine in asdict(self).items():
            if saved.get(name) != mine:
                raise UserError(
                    f"{where} belongs to another run: {name} was {saved.get(name)!r}, now {mine!r};"
                    " give a new --output, or --resume never to begin anew"
                )


@dataclass
class Ledger:
    """Counts what was really trained on in an epoch: the proof that every sample came exactly once.

    `digest` is the order-independent hash of the ids (data/keyed.py); both add up over ranks, modulo 2^64.
    """

    count: int = 0
    digest: int = 0

    def add(self, ids: Ids) -> None:
        self.count += len(ids)
        self.digest = (self.digest + ids_digest(ids)) % 2**64

    def as_integers(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(2,) int64, for a sum over ranks."""
        return np.array([self.count, self.digest], dtype=np.uint64).view(np.int64)

    @staticmethod
    def from_integers(values: np.ndarray[Any, np.dtype[np.int64]]) -> Ledger:
        count, digest = values.view(np.uint64).tolist()
        return Ledger(count, digest)

    def row(self, epoch: int, samples: int, times: Ids | None = None) -> dict[str, Any]:
        """The line of ledger.jsonl: what was counted, what should have been, and whether they agree.

        times: how often each sample should come, (samples,), where that is not once: then `exactly_once` says that each
        of these times was, and `times` the fewest and the most of them.
        """
        wanted = samples if times is None else int(times.sum())
        expected = full_digest(samples) if times is None else repeated_digest(times)
        exact = self.count == wanted and self.digest == expected
        more = {} if times is None else {"distinct_samples": samples, "times": [int(times.min()), int(times.max())]}
        return {
            "epoch": epoch,
            "samples": self.count,
            "digest": f"{self.digest:016x}",
            "expected_samples": wanted,
            "expected_digest": f"{expected:016x}",
            "exactly_once": exact,
            **more,
        }


def repeated_digest(times: Ids, block: int = 1 << 16) -> int:
    """`ids_digest` of samples that come `times` times each, block by block."""
    parts = (every_time(times[start : start + block], start) for start in range(0, len(times), block))
    return sum(map(ids_digest, parts)) % 2**64
