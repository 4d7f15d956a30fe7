from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from distcnn.data.order import Geometry
from distcnn.errors import UserError
from distcnn.state import Identity, Ledger, Position

IDENTITY = Identity.of("abc", 3, Geometry(64, 8), 16)


def test_a_position_moves_by_steps_and_epochs() -> None:
    there = Position().advance(64).advance(64).advance(17)
    assert there == Position(epoch=0, step=3, total=3, samples=145)
    assert there.next_epoch().advance(64) == Position(epoch=1, step=1, total=4, samples=209)


@pytest.mark.parametrize("name", ["epoch", "step", "total", "samples"])
def test_a_position_counts_from_0(name: str) -> None:
    with pytest.raises(ValueError, match="counts from 0"):
        Position(**{name: -1})


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("fingerprint", "abd"),
        ("seed", 4),
        ("global_batch", 128),
        ("tile", 16),
        ("window_shards", 1),
        ("version", 2),
        ("order_version", 99),
    ],
)
def test_another_identity_is_refused_with_the_difference(name: str, other: object) -> None:
    IDENTITY.check(asdict(IDENTITY), "here")
    with pytest.raises(UserError) as caught:
        IDENTITY.check(asdict(IDENTITY) | {name: other}, "runs/x")
    mine = getattr(IDENTITY, name)
    assert f"runs/x belongs to another run: {name} was {other!r}, now {mine!r};" in str(caught.value)
    missing = {key: value for key, value in asdict(IDENTITY).items() if key != name}
    with pytest.raises(UserError, match=f"{name} was None"):
        IDENTITY.check(missing, "runs/x")


def ledger_of(*parts: list[int]) -> Ledger:
    ledger = Ledger()
    for part in parts:
        ledger.add(np.array(part, dtype=np.int64))
    return ledger


def test_a_ledger_knows_each_sample_came_once_in_any_order_and_any_parts() -> None:
    assert ledger_of([0, 1, 2, 3, 4]) == ledger_of([4, 2], [], [0], [3, 1])
    assert ledger_of([3, 0], [], [1, 2]).row(7, 4)["exactly_once"]


@pytest.mark.parametrize(
    "ids", [[0, 1, 2], [0, 1, 2, 3, 3], [0, 1, 2, 2], [0, 1, 2, 4], [0, 0, 3, 3], [0, 1, 2, 3, 4], []]
)
def test_a_ledger_sees_what_is_missing_or_comes_twice(ids: list[int]) -> None:
    row = ledger_of(ids).row(0, 4)
    assert not row["exactly_once"] and row["samples"] == len(ids) and row["expected_samples"] == 4


def test_the_digest_is_pinned() -> None:
    assert ledger_of(list(range(100))).row(2, 100) == {
        "epoch": 2,
        "samples": 100,
        "digest": "00b47d67393e3db8",
        "expected_samples": 100,
        "expected_digest": "00b47d67393e3db8",
        "exactly_once": True,
    }


def test_ledgers_of_several_ranks_add_up_as_integers_modulo_2_to_64() -> None:
    parts = [ledger_of(list(range(rank, 50, 3))) for rank in range(3)]
    with np.errstate(over="ignore"):
        total = sum((part.as_integers() for part in parts), np.zeros(2, dtype=np.int64))
    assert Ledger.from_integers(total) == ledger_of(list(range(50)))
    big = Ledger(3, 2**64 - 1)
    assert Ledger.from_integers(big.as_integers()) == big and big.as_integers().dtype == np.int64


def test_an_empty_split_is_exact() -> None:
    assert Ledger().row(0, 0)["exactly_once"]


def test_a_position_is_frozen_and_replaceable() -> None:
    assert replace(Position(), epoch=2).epoch == 2
