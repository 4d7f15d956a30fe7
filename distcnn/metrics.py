"""From one row a sample to metrics. Rows of all ranks are put in id order first, so the numbers have one value.

A row is (id, label, predicted class, probability of the predicted class, place of the label among the classes, loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from distcnn.pixels import to_device

ID, LABEL, PREDICTED, CONFIDENCE, PLACE, LOSS = range(6)
CALIBRATION_BINS = 15
Z_95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def rows_of(logits_NK: torch.Tensor, ids: NDArray[np.int64], labels_N: torch.Tensor) -> torch.Tensor:
    """(n, 6) float64 rows of a tile, on the device of the logits: nothing is read back here.

    PLACE counts the classes that are ahead of the label's: a higher logit, or an equal one and a lower number. What
    is not a number is ahead of everything, so a model that has diverged is never right.
    """
    logits_NK = logits_NK.float()
    predicted_N = logits_NK.argmax(1)  # the first of equals; softmax would make equals of what is not
    confidence_N = logits_NK.softmax(1).gather(1, predicted_N[:, None])[:, 0]
    own_N1 = logits_NK.gather(1, labels_N.clamp(min=0)[:, None])
    higher_number_NK = torch.arange(logits_NK.shape[1], device=logits_NK.device)[None, :] > labels_N[:, None]
    behind_NK = (logits_NK < own_N1) | ((logits_NK == own_N1) & higher_number_NK)
    classes = logits_NK.shape[1]
    place_N = torch.where(labels_N < 0, classes, classes - 1 - behind_NK.sum(1))  # no label: never right
    loss_N = cross_entropy(logits_NK, labels_N, reduction="none", ignore_index=-1)
    ids_N = to_device(ids, logits_NK.device)
    columns = (ids_N, labels_N, predicted_N, confidence_N, place_N, loss_N)
    return torch.stack([column.to(torch.float64) for column in columns], dim=1)


@dataclass(frozen=True)
class Evaluation:
    """Rows of a whole split in the order of their ids, each id once, and what follows from them."""

    rows: NDArray[np.float64]  # (n, 6)
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.rows) and (np.diff(self.rows[:, ID]) <= 0).any():
            raise ValueError("evaluation rows must be sorted by id, each id once")

    @property
    def samples(self) -> int:
        return len(self.rows)

    def top(self, k: int) -> float:
        """Share of samples whose label is among the k most probable classes."""
        return int((self.rows[:, PLACE] < k).sum()) / max(self.samples, 1)

    @property
    def loss(self) -> float:
        """Mean cross entropy, summed exactly (math.fsum)."""
        return math.fsum(self.rows[:, LOSS]) / max(self.samples, 1)

    def confusion(self) -> NDArray[np.int64]:
        """(K, K) counts: row the label, column the prediction."""
        k = len(self.classes)
        pairs = self.rows[:, LABEL].astype(np.int64) * k + self.rows[:, PREDICTED].astype(np.int64)
        return np.bincount(pairs, minlength=k * k).reshape(k, k)

    def calibration_error(self) -> float:
        """Expected calibration error over 15 equal bins (Guo et al., "On calibration of modern networks", 2017)."""
        bins = self.calibration_bins()
        if not bins:
            return math.nan
        return math.fsum(abs(confidence - right) for _, confidence, right in bins) / max(self.samples, 1)

    def calibration_bins(self) -> list[tuple[int, float, int]]:
        """(samples, sum of confidences, right) of each of 15 equal bins; [] where a confidence is not a number."""
        confidence = self.rows[:, CONFIDENCE]
        if not np.isfinite(confidence).all():
            return []
        bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        right = self.rows[:, PLACE] == 0
        parts = [bins == number for number in range(CALIBRATION_BINS)]
        return [(int(mine.sum()), math.fsum(confidence[mine]), int(right[mine].sum())) for mine in parts]

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 (scikit-learn) and support of every class; 0 where a ratio is not defined."""
        from sklearn.metrics import precision_recall_fscore_support

        label, predicted = self.rows[:, LABEL].astype(np.int64), self.rows[:, PREDICTED].astype(np.int64)
        found = precision_recall_fscore_support(label, predicted, labels=range(len(self.classes)), zero_division=0)
        return [
            {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "samples": int(n)}
            for name, p, r, f, n in zip(self.classes, *found, strict=True)
        ]

    def summary(self) -> dict[str, float]:
        """The scalars that go to metrics.jsonl, without a prefix."""
        low, high = wilson(round(self.top(1) * self.samples), self.samples)
        values = {"loss": self.loss, "top1": self.top(1), "top1_low": low, "top1_high": high}
        if len(self.classes) > 5:
            values["top5"] = self.top(5)
        return values | {"calibration_error": self.calibration_error(), "samples": self.samples}


def wilson(right: int, samples: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, "Probable inference", JASA 1927)."""
    if samples == 0:
        return 0.0, 1.0
    p, z2 = right / samples, Z_95**2
    middle = (p + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z_95 * math.sqrt(p * (1 - p) / samples + z2 / (4 * samples**2)) / (1 + z2 / samples)
    return max(min(middle - half, p), 0.0), min(max(middle + half, p), 1.0)  # p lies between, rounding or not


def sort_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 6) in the order of the ids."""
    return rows[np.argsort(rows[:, ID], kind="stable")]
