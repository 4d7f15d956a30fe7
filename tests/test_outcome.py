from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from distcnn.data.order import Ids
from distcnn.errors import DataError
from distcnn.metrics import CONFIDENCE, ID, LABEL, LOSS, PLACE, PREDICTED, Evaluation
from distcnn.outcome import (
    BEST,
    FOLDER,
    LAST,
    MAX_CASES,
    Outcome,
    forget_outcomes,
    outcome_of,
    read_outcome,
    write_outcome,
)
from distcnn.state import Position
from tests.harness import simulate, small_config

CLASSES = ("<script>", "b", "c", "never", "\udc80")


def keys(ids: Ids) -> list[tuple[str, str]]:
    return [(f"s{i // 10}.tar", f"k{i}\udcff") for i in ids.tolist()]


def evaluation(n: int, seed: int = 0) -> Evaluation:
    """Class 3 is never a label; the others are right half the time."""
    random = np.random.default_rng(seed)
    rows = np.zeros((n, 6))
    rows[:, ID] = np.arange(n)
    rows[:, LABEL] = random.choice([0, 1, 2, 4], n)
    rows[:, PREDICTED] = np.where(random.random(n) < 0.5, rows[:, LABEL], random.integers(0, 5, n))
    rows[:, PLACE] = rows[:, LABEL] != rows[:, PREDICTED]
    rows[:, CONFIDENCE], rows[:, LOSS] = random.random(n), random.random(n) * 5
    return Evaluation(rows, CLASSES)


def outcome(found: Evaluation, epoch: int = 2, step: int = 40) -> Outcome:
    return outcome_of(found, "val", Position(epoch, 0, step, 10 * step), keys)


def test_the_counts_are_scikit_learns() -> None:
    found = evaluation(300)
    made = outcome(found)
    label, predicted = found.rows[:, LABEL], found.rows[:, PREDICTED]
    assert (made.confusion() == confusion_matrix(label, predicted, labels=range(5))).all()
    expected = precision_recall_fscore_support(label, predicted, labels=range(5), zero_division=0)
    scores = made.class_scores()
    for name, values in zip(("precision", "recall", "f1", "samples"), expected, strict=True):
        assert [getattr(score, name) for score in scores] == pytest.approx(values.tolist(), abs=1e-12), name
    assert scores[3].samples == 0 and scores[3].interval == (0, 1) and tuple(s.name for s in scores) == CLASSES
    assert sum(samples for samples, _, _ in made.bins) == 300
    gaps = sum(abs(confidence - right) for _, confidence, right in made.bins)
    assert gaps / 300 == pytest.approx(found.calibration_error(), abs=1e-12)
    worst = made.confused(3)
    matrix = made.confusion() * (1 - np.eye(5, dtype=np.int64))
    assert worst[0][2] == matrix.max() and [row[2] for row in worst] == sorted((r[2] for r in worst), reverse=True)


def test_the_samples_worth_a_look() -> None:
    found = evaluation(300)
    made = outcome(found)
    wrong = [row for row in found.rows if row[PLACE] != 0]
    assert [case.loss for case in made.wrong] == sorted((row[LOSS] for row in wrong), reverse=True)[:MAX_CASES]
    assert [case.confidence for case in made.unsure] == sorted(found.rows[:, CONFIDENCE])[:MAX_CASES]
    for case in (*made.wrong, *made.unsure):
        row = found.rows[case.id]
        assert (case.shard, case.key) == (f"s{case.id // 10}.tar", f"k{case.id}\udcff")
        assert (case.label, case.predicted, case.loss) == (row[LABEL], row[PREDICTED], row[LOSS])


def test_of_equals_the_first_come_first() -> None:
    """So that it does not depend on how sorting is done."""
    rows = np.zeros((100, 6))
    rows[:, ID], rows[:, PREDICTED], rows[:, PLACE], rows[:, LOSS] = np.arange(100), 1, 1, 0.5
    made = outcome(Evaluation(rows, CLASSES))
    assert [case.id for case in made.wrong] == [case.id for case in made.unsure] == list(range(MAX_CASES))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_worst_and_survives_the_file(tmp_path: Path, value: float) -> None:
    rows = evaluation(50).rows.copy()
    rows[7, [CONFIDENCE, LOSS, PLACE]] = math.nan, value, 5
    made = outcome(Evaluation(rows, CLASSES))
    assert made.wrong[0].id == made.unsure[0].id == 7 and made.bins == ()
    write_outcome(tmp_path, made, best=False)
    json.loads((tmp_path / FOLDER / LAST).read_text(), parse_constant=pytest.fail)
    read = read_outcome(tmp_path)
    assert read is not None and math.isnan(read.wrong[0].loss) and math.isnan(read.summary["calibration_error"])


def test_the_file_holds_all_of_it(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    made, better = outcome(evaluation(60)), outcome(evaluation(60, seed=1), epoch=1, step=20)
    write_outcome(tmp_path, better, best=True)
    write_outcome(tmp_path, made, best=False)
    assert read_outcome(tmp_path) == made and read_outcome(tmp_path, BEST) == better
    empty = outcome(Evaluation(np.zeros((0, 6)), CLASSES))
    write_outcome(tmp_path, empty, best=False)
    assert read_outcome(tmp_path) == empty and empty.counts == () and empty.class_scores()[0].samples == 0


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"version": 9}', '{"version": 1}', '{"version": 1, "counts": 3}', "[" * 100_000]
)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    write_outcome(tmp_path, outcome(evaluation(5)), best=False)
    (tmp_path / FOLDER / LAST).write_text(damage)
    with pytest.raises(DataError, match=r"last\.json"):
        read_outcome(tmp_path)


def test_a_label_out_of_range_is_damage(tmp_path: Path) -> None:
    write_outcome(tmp_path, outcome(evaluation(5)), best=False)
    file = tmp_path / FOLDER / LAST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"counts": [[0, 99, 1]]}))
    with pytest.raises(DataError, match="IndexError"):
        read_outcome(tmp_path)


@pytest.mark.parametrize(
    ("position", "last", "best"),
    [
        (Position(2, 0, 40, 400), True, True),
        (Position(1, 20, 40, 400), False, True),  # the epoch's steps are done, its evaluation is not
        (Position(1, 0, 20, 200), False, True),
        (Position(1, 0, 19, 190), False, False),
        (Position(), False, False),
    ],
)
def test_evaluations_after_the_checkpoint_are_forgotten(
    tmp_path: Path, position: Position, last: bool, best: bool
) -> None:
    write_outcome(tmp_path, outcome(evaluation(9), epoch=1, step=20), best=True)
    write_outcome(tmp_path, outcome(evaluation(9), epoch=2, step=40), best=False)
    forget_outcomes(tmp_path, position)
    assert ((tmp_path / FOLDER / LAST).exists(), (tmp_path / FOLDER / BEST).exists()) == (last, best)
    forget_outcomes(tmp_path / "no run at all", position)


def test_it_is_the_same_file_from_any_number_of_ranks(stripes_set: Path, tmp_path: Path) -> None:
    files = []
    for ranks in (1, 4):
        run = tmp_path / str(ranks)
        simulate(small_config(stripes_set, run), ranks)
        files.append({path.name: path.read_bytes() for path in (run / FOLDER).iterdir()})
    assert files[0] == files[1] and set(files[0]) == {LAST, BEST}
    last = read_outcome(tmp_path / "4")
    assert last is not None and (last.epoch, last.step, last.samples_seen) == (2, 6, 134)
    assert sum(n for _, _, n in last.counts) == 37 and len(last.unsure) == MAX_CASES
    assert all(case.shard.startswith("val-") for case in last.wrong)
