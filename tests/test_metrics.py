# N samples, K classes
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch.nn.functional import cross_entropy

from distcnn.metrics import (
    CONFIDENCE,
    ID,
    LABEL,
    LOSS,
    PLACE,
    PREDICTED,
    Evaluation,
    rows_of,
    sort_rows,
    wilson,
)

CLASSES = tuple("abcdefg")


def sample(n: int = 200, seed: int = 0, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, K) that are right more often than not, and labels (n,); class 6 is never a label."""
    source = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, classes - 1, (n,), generator=source)
    logits_NK = torch.randn(n, classes, generator=source) * 2
    logits_NK[torch.arange(n), labels_N] += 2
    return logits_NK, labels_N


def evaluation(n: int = 200, seed: int = 0) -> Evaluation:
    logits_NK, labels_N = sample(n, seed)
    return Evaluation(rows_of(logits_NK, np.arange(n), labels_N).numpy(), CLASSES)


def test_against_torch_and_scikit_learn() -> None:
    found = evaluation()
    logits_NK, labels_N = sample()
    scores, labels = logits_NK.numpy(), labels_N.numpy()
    predicted = scores.argmax(1)
    assert found.samples == 200
    assert found.top(1) == accuracy_score(labels, predicted)
    for k in (2, 5, 6):
        assert found.top(k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(7)), abs=1e-12)
    assert found.top(7) == 1
    assert found.loss == pytest.approx(cross_entropy(logits_NK.double(), labels_N).item(), rel=1e-6)
    assert (found.confusion() == confusion_matrix(labels, predicted, labels=range(7))).all()
    expected = precision_recall_fscore_support(labels, predicted, labels=range(7), zero_division=0)
    for row, p, r, f, n in zip(found.per_class(), *expected, strict=True):
        assert (row["precision"], row["recall"], row["f1"], row["samples"]) == (p, r, f, n)
    assert [row["class"] for row in found.per_class()] == list(CLASSES)
    assert found.per_class()[6]["samples"] == 0 == found.per_class()[6]["recall"]


def test_confidence_is_that_of_the_predicted_class() -> None:
    rows = evaluation().rows
    logits_NK, labels_N = sample()
    assert torch.allclose(torch.from_numpy(rows[:, CONFIDENCE]).float(), logits_NK.softmax(1).amax(1), atol=1e-6)
    assert (rows[:, PREDICTED] == logits_NK.argmax(1).numpy()).all() and (rows[:, LABEL] == labels_N.numpy()).all()
    assert ((rows[:, PLACE] == 0) == (rows[:, LABEL] == rows[:, PREDICTED])).all()


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("logits", "label", "place", "predicted"),
    [
        ([3.0, 2.0, 1.0], 0, 0, 0),
        ([3.0, 2.0, 1.0], 2, 2, 0),
        ([1.0, 1.0, 1.0], 0, 0, 0),  # of equals the lower number is first
        ([1.0, 1.0, 1.0], 1, 1, 0),
        ([1.0, 1.0, 1.0], 2, 2, 0),
        ([0.0, 5.0, 5.0], 2, 1, 1),
        ([0.0, 5.0, 5.0], 1, 0, 1),
        ([16777216.0, 16777218.0, 0.0], 0, 1, 1),
        ([20.0, 20.000002, -90.0], 0, 1, 1),  # softmax gives both 0.5
        ([-INF, 0.0, 1.0], 0, 2, 2),
        ([INF, 0.0, 1.0], 0, 0, 0),
        ([NAN, NAN, NAN], 0, 2, 0),  # a model that has diverged is not right
        ([NAN, NAN, NAN], 2, 2, 0),
        ([NAN, 1.0, 0.0], 1, 1, 0),
        ([NAN, 1.0, 0.0], 0, 2, 0),
    ],
)
def test_ties_and_what_is_not_a_number(logits: list[float], label: int, place: int, predicted: int) -> None:
    row = rows_of(torch.tensor([logits]), np.array([7]), torch.tensor([label]))[0].tolist()
    assert (row[ID], row[LABEL], row[PLACE], row[PREDICTED]) == (7, label, place, predicted)


def test_a_diverged_model_has_no_score() -> None:
    rows = rows_of(torch.full((4, 7), NAN), np.arange(4), torch.arange(4)).numpy()
    found = Evaluation(rows, CLASSES).summary()
    assert found["top1"] == 0 and math.isnan(found["loss"]) and math.isnan(found["calibration_error"])


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits_NK = torch.tensor([[1.0, 1.0078125, -30.0]], dtype=torch.bfloat16)
    row = rows_of(logits_NK, np.array([0]), torch.tensor([0]))[0]
    expected = cross_entropy(logits_NK.float(), torch.tensor([0])).double()
    assert row[PLACE] == 1 and row[LOSS] == expected


def test_unlabelled_samples_have_loss_0_and_are_never_right() -> None:
    row = rows_of(torch.tensor([[5.0, 1.0]]), np.array([0]), torch.tensor([-1]))[0]
    assert row[LABEL] == -1 and row[LOSS] == 0 and row[PREDICTED] == 0 and row[PLACE] == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_same_numbers_whatever_order_the_rows_come_in(ranks: int) -> None:
    alone = evaluation(101)
    parts = [alone.rows[rank::ranks] for rank in reversed(range(ranks))]
    shuffled = np.random.default_rng(ranks).permutation(np.concatenate(parts))
    again = Evaluation(sort_rows(shuffled), CLASSES)
    assert again.summary() == alone.summary() and (again.confusion() == alone.confusion()).all()


@pytest.mark.parametrize("ids", [[0, 1, 1], [1, 0, 2]])
def test_rows_are_sorted_and_each_id_comes_once(ids: list[int]) -> None:
    rows = evaluation(3).rows.copy()
    rows[:, ID] = ids
    with pytest.raises(ValueError, match="each id once"):
        Evaluation(rows, CLASSES)


def test_the_loss_is_summed_exactly() -> None:
    rows = np.zeros((3, 6))
    rows[:, ID], rows[:, LOSS] = range(3), [1e16, 1.0, -1e16]
    assert Evaluation(rows, CLASSES).loss == 1 / 3


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 10), (10, 10), (5, 10), (97, 100), (1, 3), (359, 359)])
def test_wilson_interval_against_scipy(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1


def test_wilson_interval_of_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_calibration_error_by_hand() -> None:
    """Bins of 1/15. Three samples at 0.95 of which two are right, one at 0.5 wrong, one at 1.0 right, one at 0.0."""
    confidence = np.array([0.95, 0.95, 0.95, 0.5, 1.0, 0.0])
    rows = np.zeros((6, 6))
    rows[:, ID], rows[:, CONFIDENCE], rows[:, PLACE] = range(6), confidence, [0, 0, 1, 1, 0, 0]
    expected = (abs(3 * 0.95 + 1.0 - 3) + 0.5 + 1.0) / 6  # 0.95 and 1.0 share the last bin, 14/15 .. 1
    assert Evaluation(rows, CLASSES).calibration_error() == pytest.approx(expected, abs=1e-12)


def test_calibration_of_a_model_that_is_as_sure_as_it_is_right() -> None:
    rows = np.zeros((10, 6))
    rows[:, ID], rows[:, CONFIDENCE], rows[:, PLACE] = range(10), 0.7, [0] * 7 + [1] * 3
    assert Evaluation(rows, CLASSES).calibration_error() == pytest.approx(0, abs=1e-12)


def test_the_summary_holds_what_metrics_jsonl_shows() -> None:
    names = ["loss", "top1", "top1_low", "top1_high", "top5", "calibration_error", "samples"]
    assert list(evaluation().summary()) == names
    few = Evaluation(evaluation(9).rows, CLASSES[:5])
    assert "top5" not in few.summary(), "of five classes, top-5 is always right"


def test_an_empty_split_has_no_score_and_divides_by_nothing() -> None:
    nothing = Evaluation(np.zeros((0, 6)), CLASSES)
    assert (nothing.top(1), nothing.loss, nothing.calibration_error()) == (0, 0, 0)
    assert nothing.confusion().sum() == 0
