from __future__ import annotations

import pytest
import torch
from torch import nn

from distcnn.batchnorm import TileStatistics, convert
from distcnn.ema import Ema


def test_it_is_the_exponential_average_and_its_buffers_are_the_models() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = Ema(model, 0.75)
    expected = model[0].weight.detach().double().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model[0].weight += step
            model[1].running_mean += step
            model[1].num_batches_tracked += 1
        ema.update(model)
        expected = 0.75 * expected + 0.25 * model[0].weight.detach().double()
        assert torch.allclose(ema.model[0].weight.double(), expected, rtol=1e-6)
        assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
        assert ema.model[1].num_batches_tracked == step


def test_the_average_is_apart_from_the_model_and_is_not_trained() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    before = ema.model.weight.clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(ema.model.weight, before)
    assert list(ema.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_a_model_that_stands_still_is_its_own_average(decay: float) -> None:
    model = convert(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), "tile")
    assert TileStatistics(model).size == 4
    ema = Ema(model, decay)
    for _ in range(50):
        ema.update(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ema.model.parameters(), strict=True))
