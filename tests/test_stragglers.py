from __future__ import annotations

from typing import Any

import pytest
import torch

from distcnn import stragglers
from distcnn.stragglers import Stragglers


def step(ranks: list[tuple[float, float]]) -> torch.Tensor:
    """The sum over the ranks of what each says of itself: (data, compute) seconds."""
    said = [Stragglers(rank, len(ranks), pytest.fail).mine(*times) for rank, times in enumerate(ranks)]
    return torch.stack(said).sum(0)


def watch(ranks: list[tuple[float, float]], steps: int) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    found = Stragglers(0, len(ranks), lines.append)
    for _ in range(steps):
        found.add(step(ranks))
    return found.row(), lines


@pytest.mark.parametrize(
    ("ranks", "slowest", "its", "others", "said"),
    [
        ([(0.0, 0.1), (0.0, 0.3)], 1, 0.3, 0.1, "rank 1 is slow: 0.300 s a step by itself, mostly computing"),
        (
            [(0.2, 0.1), (0.0, 0.1), (0.0, 0.2)],
            0,
            0.3,
            0.15,
            "rank 0 is slow: 0.300 s a step by itself, mostly waiting",
        ),
        ([(0.0, 0.1), (0.0, 0.14), (0.0, 0.1)], 1, 0.14, 0.1, ""),  # within what is usual
        ([(0.0, 0.001), (0.0, 0.003)], 1, 0.003, 0.001, ""),  # noise of a few milliseconds
        ([(0.0, 0.0), (0.0, 0.0)], 0, 0.0, 0.0, ""),
    ],
)
def test_the_slowest_is_found_and_named_if_it_matters(
    ranks: list[tuple[float, float]], slowest: int, its: float, others: float, said: str
) -> None:
    row, lines = watch(ranks, stragglers.LEAST_STEPS)
    assert row["perf/slowest_rank"] == slowest
    assert row["perf/slowest_step_seconds"] == pytest.approx(its)
    assert row["perf/other_step_seconds"] == pytest.approx(others)
    assert len(lines) == bool(said) and (not said or lines[0].startswith(said))


def test_too_few_steps_say_nothing() -> None:
    assert watch([(0.0, 0.1), (0.0, 0.3)], stragglers.LEAST_STEPS - 1)[1] == []


def test_at_most_one_line_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"time": 100.0}
    monkeypatch.setattr("distcnn.stragglers.time.monotonic", lambda: now["time"])
    lines: list[str] = []
    found = Stragglers(0, 2, lines.append)
    for minute in range(6):
        now["time"] = 100.0 + minute * stragglers.EVERY_SECONDS / 2
        for _ in range(stragglers.LEAST_STEPS):
            found.add(step([(0.0, 0.1), (0.0, 0.3)]))
        found.row()
    assert len(lines) == 3 and "median of 40 steps" in lines[1]


def test_one_rank_alone_adds_nothing_to_the_sums() -> None:
    alone = Stragglers(0, 1, pytest.fail)
    assert alone.length == 0 and alone.mine(1.0, 2.0).shape == (0,)
    alone.add(torch.zeros(0))
    assert alone.row() == {}
