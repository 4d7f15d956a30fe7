"""Draws are a function of their key alone, and are distributed as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcnn.data import keyed

IDS = np.arange(100_000)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_draws_are_pinned() -> None:
    """Another value here changes the augmentation of every run ever made."""
    assert keyed.mix(np.array([0, 1, 2**64 - 1], dtype=np.uint64)).tolist() == [
        16294208416658607535,  # SplitMix64's first output for seed 0, as its authors publish it
        10451216379200822465,
        16490336266968443936,
    ]
    assert keyed.words(np.array([0, 1, 10**9]), seed=42, epoch=3, operation=keyed.FLIP).tolist() == [
        18396819878501383114,
        17404471050485396229,
        4639581831693247851,
    ]
    assert keyed.uniform(np.array([5]), 0, 0, keyed.AREA).tolist() == [0.7471143172746567]


def test_operations_have_numbers_of_their_own() -> None:
    numbers = {name: value for name, value in vars(keyed).items() if name.isupper() and isinstance(value, int)}
    assert len(set(numbers.values())) == len(numbers)
    assert PINNED_NUMBERS.items() <= numbers.items(), "a number, once given, never changes its meaning"


PINNED_NUMBERS = {
    "FLIP": 1,
    "CROP_TOP": 2,
    "CROP_LEFT": 3,
    "AREA": 4,
    "RATIO": 5,
    "MIX_KIND": 6,
    "MIX_SHARE": 7,
    "MIX_PARTNER": 8,
    "CUT_TOP": 9,
    "CUT_LEFT": 10,
    "FORWARD": 11,
}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**62), max_size=30), st.integers(0, 2**63 - 1), st.integers(0, 1000), st.data())
def test_a_draw_does_not_depend_on_the_batch(ids: list[int], seed: int, epoch: int, data: st.DataObject) -> None:
    whole = keyed.uniform(np.array(ids, dtype=np.int64), seed, epoch, keyed.FLIP)
    shuffled = data.draw(st.permutations(range(len(ids))))
    part = keyed.uniform(np.array([ids[i] for i in shuffled], dtype=np.int64), seed, epoch, keyed.FLIP)
    assert whole[list(shuffled)].tolist() == part.tolist()
    assert all(0 <= value < 1 for value in whole)


@pytest.mark.parametrize("operation", [keyed.FLIP, keyed.AREA, 1000])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**63 - 1, 299)])
def test_draws_are_uniform(seed: int, epoch: int, operation: int) -> None:
    """Chi-square over 100 bins: 99 degrees of freedom, 148.2 has p = 0.001."""
    draws = keyed.uniform(IDS, seed, epoch, operation)
    assert chi_square(np.histogram(draws, 100, (0, 1))[0]) < 148.2


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 0, 1), (0, 0, 2)), ((0, 0, 1), (0, 1, 1)), ((0, 0, 1), (1, 0, 1)), ((0, 1, 0), (1, 0, 0))],
)
def test_draws_of_different_keys_are_independent(one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    a, b = keyed.uniform(IDS, *one), keyed.uniform(IDS, *other)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(IDS))
    pairs = np.histogram2d(a, b, 10, [[0, 1], [0, 1]])[0].ravel()
    assert chi_square(pairs) < 148.2


def test_draws_of_neighbouring_ids_are_independent() -> None:
    draws = keyed.uniform(IDS, 3, 0, keyed.FLIP)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / np.sqrt(len(IDS))


def test_streams_are_uniform_and_their_own() -> None:
    a, b = keyed.stream(1, 0, 0, keyed.MIX_KIND), keyed.stream(2, 0, 0, keyed.MIX_KIND)
    draws = np.array([[next(a), next(b)] for _ in range(4000)])
    assert chi_square(np.histogram(draws[:, 0], 20, (0, 1))[0]) < 43.8  # 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws.T)[0, 1]) < 4 / np.sqrt(4000)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 2.0])
def test_beta_draws_have_the_moments_of_beta(alpha: float) -> None:
    """Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))."""
    floats = keyed.stream(7, 1, 2, keyed.MIX_KIND)
    draws = np.array([keyed.beta(alpha, floats) for _ in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(draws.mean() - 0.5) < 4 * np.sqrt(variance / len(draws))
    assert abs(draws.var() / variance - 1) < 0.1
    assert draws.min() >= 0 and draws.max() <= 1


def test_digests_add_up_and_tell_sets_apart() -> None:
    ids = np.random.default_rng(0).permutation(5000)
    total = sum(keyed.ids_digest(part) for part in np.split(ids, [1, 17, 3000])) % 2**64
    assert total == keyed.full_digest(5000, block=999) == keyed.ids_digest(np.arange(5000))
    doubled = ids.copy()
    doubled[0] = doubled[1]
    assert keyed.ids_digest(doubled) != total
    assert keyed.full_digest(0) == 0


def test_tile_keys_are_distinct() -> None:
    keys = {keyed.tile_key(step, lane) for step in range(50) for lane in range(1024)}
    assert len(keys) == 50 * 1024
