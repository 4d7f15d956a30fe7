# N batch, C channel, H W pixels
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distcnn.batchnorm import FrozenBatchNorm2d, TileBatchNorm2d, TileStatistics, convert

YES, NO = torch.tensor(True), torch.tensor(False)


def image(n: int, channels: int = 3, side: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def net(affine: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 2, 1))
    if affine:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    return model


@pytest.mark.parametrize("affine", [True, False])
def test_one_tile_a_step_is_torch_batch_norm(affine: bool) -> None:
    """Outputs, gradients and running statistics of several steps of one tile each, to rounding."""
    plain, ours = net(affine), convert(net(affine), "tile")
    statistics = TileStatistics(ours)
    for step, n in enumerate((5, 2, 7)):
        x_NCHW = image(n, seed=step)
        outputs, gradients = [], []
        for model in (plain, ours):
            model.zero_grad()
            given = x_NCHW.clone().requires_grad_()
            out = model(given)
            out.square().sum().backward()
            outputs.append(out)
            gradients.append([given.grad, *(p.grad for p in model.parameters())])
        statistics.apply(statistics.collect(n), n, YES)
        assert torch.equal(outputs[0], outputs[1])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        for name, value in plain.state_dict().items():
            assert torch.allclose(value.double(), ours.state_dict()[name].double(), rtol=1e-6, atol=1e-7), name
    assert ours[1].num_batches_tracked == 3


def test_running_values_move_once_a_step_by_the_mean_over_samples() -> None:
    """Three tiles of 4, 4 and 2 samples: the sample-weighted mean of their means and unbiased variances."""
    norm = convert(nn.Sequential(nn.BatchNorm2d(3, momentum=0.3)), "tile")[0]
    statistics = TileStatistics(norm)
    tiles = [image(4, seed=1), image(4, seed=2), image(2, seed=3)]
    total = torch.zeros(statistics.size, dtype=torch.float64)
    for tile in tiles:
        norm(tile)
        assert torch.equal(norm.running_mean, torch.zeros(3)), "a forward pass notes, it does not move"
        total += statistics.collect(len(tile))
    statistics.apply(total, 10, YES)
    mean = sum(len(t) * t.double().mean((0, 2, 3)) for t in tiles) / 10
    var = sum(len(t) * t.double().var((0, 2, 3), unbiased=True) for t in tiles) / 10
    assert torch.allclose(norm.running_mean.double(), 0.3 * mean, rtol=1e-6)
    assert torch.allclose(norm.running_var.double(), 0.7 + 0.3 * var, rtol=1e-6)


def test_an_empty_tile_counts_for_nothing() -> None:
    """A rank with nothing to do runs a blank image of weight 0."""
    model = convert(net(), "tile")
    statistics = TileStatistics(model)
    model(torch.full((1, 3, 4, 4), 1e30))
    assert torch.equal(statistics.collect(0), torch.zeros(8, dtype=torch.float64))


def test_a_step_that_is_left_out_moves_nothing() -> None:
    model = convert(net(), "tile")
    statistics = TileStatistics(model)
    model(image(4) * float("nan"))
    before = copy.deepcopy([model[1].running_mean, model[1].running_var])
    statistics.apply(statistics.collect(4), 4, NO)
    assert torch.equal(model[1].running_mean, before[0]) and torch.equal(model[1].running_var, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tile_that_is_not_finite_leaves_no_trace_in_the_next(value: float) -> None:
    norm = convert(nn.Sequential(nn.BatchNorm2d(3)), "tile")[0]
    statistics = TileStatistics(norm)
    norm(image(4) * value)
    statistics.collect(4)
    norm(image(4))
    found = statistics.collect(4)
    norm(image(4))
    assert found.isfinite().all() and torch.equal(found, statistics.collect(4))


def test_one_value_per_channel_is_the_bias_and_teaches_only_it() -> None:
    """torch refuses to train on it; a ragged step may leave a single sample where the image has shrunk to 1x1."""
    norm = convert(nn.Sequential(nn.BatchNorm2d(3)), "tile")[0]
    nn.init.normal_(norm.bias)
    given = torch.tensor([5.0, -2.0, 7.0]).reshape(1, 3, 1, 1).requires_grad_()
    with pytest.raises(ValueError):
        nn.BatchNorm2d(3)(given)
    out = norm(given)
    assert torch.equal(out.flatten(), norm.bias)
    (out * torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)).sum().backward()
    assert torch.equal(norm.bias.grad, torch.tensor([1.0, 2.0, 3.0]))
    assert not norm.weight.grad.any() and not given.grad.any()
    statistics = TileStatistics(norm)
    assert statistics.collect(1).tolist() == [5, -2, 7, 0, 0, 0]
    bare = convert(nn.Sequential(nn.BatchNorm2d(3, affine=False)), "tile")[0]
    assert not bare(given).any()


def test_evaluation_uses_the_running_values() -> None:
    ours, plain = convert(net(), "tile").eval(), net().eval()
    for model in (ours, plain):
        model[1].running_mean.fill_(0.5)
        model[1].running_var.fill_(2.0)
    assert torch.equal(ours(image(3)), plain(image(3)))


def test_frozen_always_uses_the_running_values_but_learns_its_weights() -> None:
    ours, plain = convert(net(), "frozen"), net().eval()
    assert isinstance(ours[1], FrozenBatchNorm2d) and TileStatistics(ours).size == 0
    out = ours.train()(image(3))
    assert torch.equal(out, plain(image(3)))
    out.sum().backward()
    assert ours[1].weight.grad.any() and not ours[1].running_mean.any() and ours[1].num_batches_tracked == 0


def test_names_and_copies() -> None:
    """The notes of a tile are no part of what is saved; a copy has notes of its own."""
    model = convert(net(), "tile")
    assert list(model.state_dict()) == list(net().state_dict())
    model.load_state_dict(net(seed=1).state_dict())
    twin = copy.deepcopy(model)
    twin(image(2))
    assert isinstance(twin[1], TileBatchNorm2d) and not model[1].tile_mean.any() and twin[1].tile_mean.any()


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"momentum": None}])
def test_kinds_that_cannot_be_converted(options: dict[str, None]) -> None:
    with pytest.raises(ValueError, match="not supported"):
        convert(nn.Sequential(nn.BatchNorm2d(3, **options)), "tile")


def test_a_model_without_batch_norm() -> None:
    statistics = TileStatistics(nn.Linear(2, 2))
    assert statistics.size == 0 and statistics.collect(3).shape == (0,)
    statistics.apply(torch.zeros(0, dtype=torch.float64), 3, YES)
    on_a_device = TileStatistics(nn.Linear(2, 2, device="meta")).collect(3)
    assert on_a_device.device.type == "meta", "it is laid beside the loss, which is there"
