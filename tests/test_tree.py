from __future__ import annotations

import numpy as np
import pytest
import torch

from distcnn.data.order import Geometry
from distcnn.tree import BinaryCounter, tree_sum

POWERS = [1, 2, 4, 8, 16, 32]


def leaves(count: int, seed: int = 0, size: int = 5) -> list[torch.Tensor]:
    """(size,) float32 each, of sizes so different that another order of the sum has other bits."""
    source = np.random.default_rng(seed)
    spread = source.standard_normal((count, size)) * 10.0 ** source.integers(-4, 5, (count, size))
    return list(torch.from_numpy(spread.astype(np.float32)))


def by_ranks(values: list[torch.Tensor], ranks: int) -> torch.Tensor:
    """The sum as `ranks` processes make it: each its lanes by the counter, then the processes by the tree."""
    geometry = Geometry(len(values), 1)
    sums = []
    for rank in range(ranks):
        counter = BinaryCounter()
        for lane in geometry.lanes_of(rank, ranks):
            counter.push([values[lane].clone()])
        sums.append(counter.total()[0])
    return tree_sum(sums)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 31, 32])
def test_the_sum_is_the_same_from_any_number_of_processes(lanes: int) -> None:
    for seed in range(5):
        values = leaves(lanes, seed)
        alone = by_ranks(values, 1)
        allowed = [ranks for ranks in range(1, lanes + 1) if lanes % ranks == 0 and lanes // ranks in POWERS]
        for ranks in allowed:
            assert torch.equal(by_ranks(values, ranks), alone), f"{lanes} lanes on {ranks} processes"
        assert torch.allclose(alone.double(), torch.stack(values).double().sum(0), rtol=1e-4, atol=1e-2)


def test_order_matters_for_these_leaves() -> None:
    """Otherwise the test above would prove nothing: from left to right the bits differ."""
    values = leaves(16)
    straight = values[0].clone()
    for value in values[1:]:
        straight += value
    assert not torch.equal(straight, by_ranks(values, 1))
    assert not torch.equal(by_ranks(leaves(12), 2), by_ranks(leaves(12), 1)), "6 lanes are no subtree"


def test_the_shape_of_the_tree_is_pinned() -> None:
    """Seven leaves: ((0+1)+(2+3)) + ((4+5)+6), whose order is visible where 2^24 swallows a one."""
    big = float(2**24)
    values = [torch.tensor([v]) for v in (big, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)]
    ((a, b), (c, d)), ((e, f), g) = (((big, 1.0), (1.0, 1.0)), ((1.0, 1.0), 1.0))
    f32 = np.float32
    expected = (f32(f32(a) + f32(b)) + f32(f32(c) + f32(d))) + (f32(f32(e) + f32(f)) + f32(g))
    assert tree_sum(values).item() == float(expected) == 2**24 + 4  # from left to right: 2^24


def test_leaves_of_several_tensors_of_several_types() -> None:
    counter = BinaryCounter()
    for n in range(1, 6):
        counter.push([torch.full((2, 3), float(n)), torch.tensor(n, dtype=torch.float64)])
    one, other = counter.total()
    assert one.tolist() == [[15.0] * 3] * 2 and other.dtype == torch.float64 and other.item() == 15


def test_the_counter_is_empty_after_total_and_after_clear() -> None:
    counter = BinaryCounter()
    counter.push([torch.ones(1)])
    counter.total()
    with pytest.raises(IndexError):
        counter.total()
    counter.push([torch.ones(1)])
    counter.clear()
    counter.push([torch.ones(1)])
    assert counter.total()[0].item() == 1


def test_one_more_leaf_joins_what_is_unfinished_newest_first() -> None:
    """What DDP's hook does with the rank's earlier tiles must be what `push` and `total` do."""
    for count in range(1, 17):
        values = leaves(count, count)
        counter, hooked = BinaryCounter(), BinaryCounter()
        for value in values:
            counter.push([value.clone()])
        for value in values[:-1]:
            hooked.push([value.clone()])
        last = values[-1].clone()
        for (waiting,) in hooked.unfinished():
            last += waiting
        assert torch.equal(last, counter.total()[0])


def test_memory_is_one_sum_a_level() -> None:
    counter = BinaryCounter()
    for n in range(1, 65):
        counter.push([torch.ones(1)])
        assert len(list(counter.unfinished())) == n.bit_count()
