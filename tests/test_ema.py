from __future__ import annotations

import pytest
import torch
from torch import nn

from distcnn.batchnorm import TileStatistics, convert
from distcnn.ema import Ema, Lookahead, first_share, lookahead_decay


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


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))


def fake_step(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.full_like(parameter, 0.1 * step + number))
        model[1].running_mean += step  # type: ignore[index, operator]
        model[1].num_batches_tracked += 1  # type: ignore[index, operator]


@pytest.mark.parametrize("total", [10, 20, 25])
def test_lookahead_does_what_airbench94_does(total: int) -> None:
    """Its loop, written down: alpha = 0.95 ** 5 * (step / total) ** 3 every 5 steps, a decay of 1 at the end."""
    mine, theirs = net(), net()
    lookahead = Lookahead(mine, 5, total)
    averages = {name: value.clone() for name, value in theirs.state_dict().items()}
    for step in range(1, total + 1):
        fake_step(mine, step)
        lookahead.update(mine, step)
        fake_step(theirs, step)
        for decay in ([0.95**5 * (step / total) ** 3] if step % 5 == 0 else []) + ([1.0] if step == total else []):
            for name, value in theirs.state_dict().items():
                if value.is_floating_point():
                    averages[name].lerp_(value, 1 - decay)
                    value.copy_(averages[name])
        for name, value in theirs.state_dict().items():
            assert torch.allclose(mine.state_dict()[name], value, rtol=1e-6), f"{name} after step {step}"
    assert mine[1].num_batches_tracked == total
    assert all(torch.equal(mine.state_dict()[name], slow) for name, slow in lookahead.slow.items())


@pytest.mark.parametrize(
    ("every", "total", "turns"),
    [(5, 12, [5, 10, 12]), (5, 10, [5, 10]), (2, 5, [2, 4, 5]), (7, 3, [3]), (2, 1, [1]), (3, 0, [])],
)
def test_the_slow_weights_turns(every: int, total: int, turns: list[int]) -> None:
    """The last step is one, so that no step of a run is lost."""
    decays = {step: lookahead_decay(step, every, total) for step in range(1, total + 1)}
    assert [step for step, decay in decays.items() if decay is not None] == turns
    rising = [decay for decay in decays.values() if decay is not None]
    assert rising == sorted(rising) and (not rising or rising[-1] == pytest.approx(0.95**every))


@pytest.mark.parametrize(("every", "total"), [(5, 100), (5, 12), (4, 6), (7, 3)])
def test_how_much_of_the_first_weights_is_left(every: int, total: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    lookahead = Lookahead(model, every, total)
    for step in range(1, total + 1):
        with torch.no_grad():
            model.weight.zero_()
        lookahead.update(model, step)
    assert model.weight.item() == pytest.approx(first_share(every, total), rel=1e-5, abs=1e-12)


def test_slow_weights_go_on_where_they_were_saved() -> None:
    one, other = net(), net()
    whole, first = Lookahead(one, 3, 12), Lookahead(other, 3, 12)
    for step in range(1, 13):
        fake_step(one, step)
        whole.update(one, step)
    for step in range(1, 5):
        fake_step(other, step)
        first.update(other, step)
    again = Lookahead(other, 3, 12)  # begins with the trained weights, one step after the last turn
    again.load(first.slow)
    for step in range(5, 13):
        fake_step(other, step)
        again.update(other, step)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
