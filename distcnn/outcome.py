"""evaluations/last.json and best.json: what an evaluation found, as counts, and the samples that are worth a look.

Made of the rows of a whole split in the order of their ids, so the same at any number of processes. K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.data.order import Ids
from distcnn.errors import DataError
from distcnn.files import write_atomically
from distcnn.metrics import CONFIDENCE, ID, LABEL, LOSS, PLACE, PREDICTED, Evaluation, wilson
from distcnn.state import Position

FOLDER, LAST, BEST = "evaluations", "last.json", "best.json"
VERSION = 1
MAX_CASES = 32  # of each kind

Keys = Callable[[Ids], list[tuple[str, str]]]  # (shard, key) of each id


@dataclass(frozen=True)
class Case:
    """A sample by name, and what the network made of it. `confidence` is the probability of the predicted class."""

    id: int
    shard: str
    key: str
    label: int
    predicted: int
    confidence: float
    loss: float


@dataclass(frozen=True)
class ClassScore:
    """How a class fared: `right` of its `samples` were found, and it was predicted `predicted` times."""

    name: str
    samples: int
    right: int
    predicted: int

    @property
    def recall(self) -> float:
        """Share of the class's samples that are predicted as it; 0 where there are none."""
        return self.right / self.samples if self.samples else 0.0

    @property
    def precision(self) -> float:
        """Share of its predictions that are right; 0 where there are none."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.right / (self.samples + self.predicted) if self.samples + self.predicted else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the recall (Wilson)."""
        return wilson(self.right, self.samples)


@dataclass(frozen=True)
class Outcome:
    """An evaluation without its rows. `counts`: (label, predicted, samples), those that are not 0, in order.

    bins: (samples, sum of their confidences, how many of them are right) of equal parts of 0 .. 1; () where a
    confidence is not a number. wrong: the wrong predictions of the highest loss. unsure: of the lowest confidence.
    """

    split: str
    epoch: int
    step: int
    samples_seen: int
    classes: tuple[str, ...]
    summary: dict[str, float]
    counts: tuple[tuple[int, int, int], ...]
    bins: tuple[tuple[int, float, int], ...]
    wrong: tuple[Case, ...]
    unsure: tuple[Case, ...]

    def class_scores(self) -> list[ClassScore]:
        """One for each class, in the order of the labels."""
        k = len(self.classes)
        label, predicted, count = np.array(self.counts, dtype=np.int64).reshape(-1, 3).T
        samples, guessed, right = np.zeros((3, k), dtype=np.int64)
        np.add.at(samples, label, count)
        np.add.at(guessed, predicted, count)
        np.add.at(right, label[label == predicted], count[label == predicted])
        rows = zip(self.classes, samples.tolist(), right.tolist(), guessed.tolist(), strict=True)
        return [ClassScore(*row) for row in rows]

    def confusion(self) -> NDArray[np.int64]:
        """(K, K) counts: row the label, column the prediction."""
        k = len(self.classes)
        matrix = np.zeros((k, k), dtype=np.int64)
        for label, predicted, count in self.counts:
            matrix[label, predicted] = count
        return matrix

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """(label, predicted, samples) of the errors made most often, the first ones first."""
        errors = [row for row in self.counts if row[0] != row[1]]
        return sorted(errors, key=lambda row: (-row[2], row[0], row[1]))[:most]


def outcome_of(evaluation: Evaluation, split: str, position: Position, keys: Keys) -> Outcome:
    """What is kept of an evaluation made at `position`. `keys` names samples, as SplitReader.keys does."""
    rows, k = evaluation.rows, len(evaluation.classes)
    pairs = rows[:, LABEL].astype(np.int64) * k + rows[:, PREDICTED].astype(np.int64)
    found, counts = np.unique(pairs, return_counts=True)
    loss = np.nan_to_num(rows[:, LOSS], nan=np.inf, posinf=np.inf)
    wrong = np.flatnonzero(rows[:, PLACE] != 0)
    worst = wrong[np.argsort(-loss[wrong], kind="stable")][:MAX_CASES]
    unsure = np.argsort(np.nan_to_num(rows[:, CONFIDENCE]), kind="stable")[:MAX_CASES]
    return Outcome(
        split=split,
        epoch=position.epoch,
        step=position.total,
        samples_seen=position.samples,
        classes=evaluation.classes,
        summary=evaluation.summary(),
        counts=tuple((int(pair) // k, int(pair) % k, int(n)) for pair, n in zip(found, counts, strict=True)),
        bins=tuple(evaluation.calibration_bins()),
        wrong=_cases(rows[worst], keys),
        unsure=_cases(rows[unsure], keys),
    )


def _cases(rows: NDArray[np.float64], keys: Keys) -> tuple[Case, ...]:
    names = keys(rows[:, ID].astype(np.int64))
    return tuple(
        Case(int(row[ID]), shard, key, int(row[LABEL]), int(row[PREDICTED]), float(row[CONFIDENCE]), float(row[LOSS]))
        for row, (shard, key) in zip(rows, names, strict=True)
    )


def write_outcome(run: Path, outcome: Outcome, best: bool) -> None:
    """Write it as the run's last evaluation, and if it is the best so far, as that, too. Raises OSError."""
    document = {"version": VERSION, **_finite(asdict(outcome))}
    data = (json.dumps(document, allow_nan=False) + "\n").encode()
    (run / FOLDER).mkdir(exist_ok=True)
    for name in (LAST, BEST) if best else (LAST,):
        write_atomically(run / FOLDER / name, data)


def read_outcome(run: Path, name: str = LAST) -> Outcome | None:
    """An evaluation of a run, None if there is none. Raises DataError for a file that is damaged."""
    path = run / FOLDER / name
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        if row.pop("version") != VERSION:
            raise DataError(f"{path} has another version than {VERSION}, which this program reads")
        cases = {kind: tuple(_case(case) for case in row[kind]) for kind in ("wrong", "unsure")}
        lists = {kind: tuple(tuple(item) for item in row[kind]) for kind in ("counts", "bins")}
        summary = {kind: _number(value) for kind, value in row["summary"].items()}
        outcome = Outcome(**{**row, **cases, **lists, "summary": summary, "classes": tuple(map(str, row["classes"]))})
        outcome.class_scores()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}): delete it") from error
    return outcome


def forget_outcomes(run: Path, position: Position) -> None:
    """Remove the evaluations made after `position`, to which a run has gone back: it makes them again."""
    for name in (LAST, BEST):
        try:
            outcome = read_outcome(run, name)
        except DataError:
            outcome = None
        if outcome is None or (outcome.epoch, outcome.step) > (position.epoch, position.total):
            (run / FOLDER / name).unlink(missing_ok=True)


def _case(row: dict[str, Any]) -> Case:
    return Case(**{**row, "confidence": _number(row["confidence"]), "loss": _number(row["loss"])})


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(value: Any) -> Any:
    """The same with null for what is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
