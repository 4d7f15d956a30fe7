# N batch, K classes
from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from distcnn.augment import Targets
from distcnn.losses import Loss, balanced_weights, loss_sum

LABELS, PARTNERS = torch.tensor([0, 2, 1, 2]), torch.tensor([2, 2, 0, 1])


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_targets(share: float, smoothing: float) -> torch.Tensor:
    """(n, K): what mixing and smoothing make of the labels."""
    hard_NK = share * one_hot(LABELS, 3).double() + (1 - share) * one_hot(PARTNERS, 3).double()
    return hard_NK * (1 - smoothing) + smoothing / 3


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5, 0.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_it_is_the_cross_entropy_against_soft_targets(share: float, smoothing: float) -> None:
    targets = Targets(LABELS, PARTNERS, share, torch.ones(4))
    expected = -(soft_targets(share, smoothing) * logits().log_softmax(1)).sum()
    assert torch.allclose(loss_sum(logits(), targets, Loss(smoothing=smoothing)), expected, rtol=1e-12)


def test_it_is_a_sum_and_a_sample_of_weight_0_counts_for_nothing() -> None:
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    given = logits().requires_grad_()
    loss = loss_sum(given, Targets(LABELS, LABELS, 1.0, weights))
    loss.backward()
    assert torch.allclose(loss, cross_entropy(logits()[::2], LABELS[::2], reduction="sum"))
    assert given.grad is not None and (given.grad[1::2] == 0).all() and (given.grad[::2] != 0).all()


def test_a_mean_over_uneven_tiles_is_the_mean_over_all_samples() -> None:
    whole = cross_entropy(logits(), LABELS)
    parts = [
        loss_sum(logits()[a:b], Targets(LABELS[a:b], LABELS[a:b], 1.0, torch.ones(b - a))) / 4
        for a, b in [(0, 3), (3, 4)]
    ]
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-12)


WEIGHTS = torch.tensor([0.5, 2.0, 1.0])


@pytest.mark.parametrize("share", [1.0, 0.7, 0.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_multiply_the_wanted_shares(share: float, smoothing: float) -> None:
    targets = Targets(LABELS, PARTNERS, share, torch.ones(4))
    expected = -(soft_targets(share, smoothing) * WEIGHTS * logits().log_softmax(1)).sum()
    assert torch.allclose(loss_sum(logits(), targets, Loss("ce", smoothing, WEIGHTS)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("share", "true_NK"),
    [
        (1.0, [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]),
        (0.9, [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]),  # a tenth of another image is not enough
        (0.5, [[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]]),
        (0.1, [[0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_binary_cross_entropy_by_hand(share: float, true_NK: list[list[int]], smoothing: float) -> None:
    targets = Targets(LABELS, PARTNERS, share, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    wanted_NK = torch.tensor(true_NK).double() * (1 - smoothing) + smoothing / 3
    p_NK = logits().sigmoid()
    loss_N = -(wanted_NK * p_NK.log() + (1 - wanted_NK) * (1 - p_NK).log()).mean(1)
    assert torch.allclose(loss_sum(logits(), targets, Loss("bce", smoothing)), loss_N[[0, 1, 3]].sum(), rtol=1e-9)
    factors_N = share * WEIGHTS.double()[LABELS] + (1 - share) * WEIGHTS.double()[PARTNERS]
    weighted = loss_sum(logits(), targets, Loss("bce", smoothing, WEIGHTS))
    assert torch.allclose(weighted, (factors_N * loss_N)[[0, 1, 3]].sum(), rtol=1e-9)


@pytest.mark.parametrize(
    ("counts", "power", "expected"),
    [
        ([10, 10], 1.0, [1, 1]),
        ([30, 10], 1.0, [2 / 3, 2]),
        ([1, 100], 0.5, [101 / 11, 10.1 / 11]),
        ([4, 0, 4], 1.0, [1, 0, 1]),  # a class without images counts for nothing
        ([7, 3], 0.0, [1, 1]),
    ],
)
def test_balanced_weights_have_a_mean_of_1_over_the_images(
    counts: list[int], power: float, expected: list[float]
) -> None:
    found = balanced_weights(counts, power)
    assert found == pytest.approx(expected)
    assert sum(c * w for c, w in zip(counts, found, strict=True)) == pytest.approx(sum(counts))
