from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from distcnn.config import ModelConfig, OptimConfig
from distcnn.models import build_model
from distcnn.muon import ITERATIONS, QUINTIC, UNIT_STEP, Lamb, Muon, orthogonalised
from distcnn.optim import blocks_behind, build_optimizer, set_learning_rate, skip_unless


def plainly(rows: torch.Tensor) -> torch.Tensor:
    """The iteration as its authors write it, in float64."""
    a, b, c = QUINTIC
    x = rows.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if rows.shape[0] > rows.shape[1] else x


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (16, 16), (64, 27), (1, 5), (5, 1), (96, 400)])
def test_orthogonalised_is_the_iteration_of_its_authors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    batch = torch.randn(3, *shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    found = orthogonalised(batch)
    for one, wanted in zip(found, map(plainly, batch), strict=True):
        assert torch.allclose(one.double(), wanted, atol=1e-4)
        assert 0.3 < torch.linalg.svdvals(one)[min(shape) // 2] < 1.25
    assert torch.equal(orthogonalised(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_nearly_singular_gradients_stay_finite_and_bounded() -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(300, 64))[0]
    found = orthogonalised(((left * torch.logspace(0, -12, 64)) @ right.T)[None])
    assert found.isfinite().all() and torch.linalg.svdvals(found).max() < 1.25


def test_muon_takes_the_filters_and_adamw_the_rest() -> None:
    """By hand: one step of a convolution is orthogonal and as large as said; the others move as AdamW moves them."""
    config = OptimConfig(optimizer="muon", lr=0.1, weight_decay=0.5, momentum=0.9)
    model = build_model(ModelConfig(model="resnet9", channels=(4, 4, 6, 8)), 3, 8, seed=0)
    twin = copy.deepcopy(model)
    optimizer, adamw = build_optimizer(config, model), build_optimizer(OptimConfig(lr=0.1, weight_decay=0.5), twin)
    torch.manual_seed(1)
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        other.grad = p.grad.clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    adamw.step()
    for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.ndim == 4:
            gradient = p.grad.reshape(len(p), -1)  # type: ignore[union-attr]
            wanted = plainly(gradient * (1 - 0.9) * 0.9 + gradient * (1 - 0.9)).reshape(p.shape)
            scale = 0.1 * 0.2 * math.sqrt(max(gradient.shape))
            assert torch.allclose(p.double(), before[name].double() * 0.95 - scale * wanted, atol=1e-5), name
        else:
            assert torch.equal(p, other), name


def airbench(lr: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network whose filters Muon keeps at their length, with gradients, and its optimizer."""
    model = build_model(ModelConfig(model="airbench", channels=(4, 6, 6)), 3, 16, seed=0)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1 + 3 * torch.rand(()))
            p.grad = torch.randn_like(p)
    return model, build_optimizer(OptimConfig(optimizer="muon", lr=lr, weight_decay=0.5, momentum=0.9), model)


def test_filters_before_batch_norm_keep_their_length() -> None:
    model, optimizer = airbench()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    filters = [name for name, p in model.named_parameters() if p.ndim == 4 and p.requires_grad]
    assert len(filters) == 6
    for name, p in model.named_parameters():
        if name in filters:
            assert p.grad is not None
            gradient = p.grad.reshape(len(p), -1)
            wanted = plainly(gradient * (1 - 0.9) * 0.9 + gradient * (1 - 0.9)).reshape(p.shape)
            unit = before[name].double() * math.sqrt(len(p)) / before[name].double().norm()
            assert torch.allclose(p.double(), unit - 0.1 * UNIT_STEP * wanted, atol=1e-4), name


def test_a_step_that_is_left_out_leaves_them_as_they_are() -> None:
    model, optimizer = airbench()
    before = [p.detach().clone() for p in model.parameters()]
    skip_unless(optimizer, torch.tensor(False))
    optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_grouped_convolutions_and_heads_are_not_for_muon() -> None:
    model = build_model(ModelConfig(model="mobilenet_v3_small"), 3, 64, seed=0)
    filters = {
        id(p) for g in build_optimizer(OptimConfig(optimizer="muon"), model).param_groups[:1] for p in g["params"]
    }
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert (id(module.weight) in filters) == (module.groups == 1)
    squeeze = build_model(ModelConfig(model="squeezenet1_1"), 3, 64, seed=0)
    groups = build_optimizer(OptimConfig(optimizer="muon"), squeeze).param_groups
    assert id(squeeze.classifier[1].weight) not in {id(p) for p in groups[0]["params"]}


def test_lamb_by_hand() -> None:
    """Two steps of algorithm 2: bias-corrected Adam plus decay, as long as the weight itself times the rate."""
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 1.0)
    optimizer = build_optimizer(OptimConfig(optimizer="lamb", lr=0.1, weight_decay=0.01), layer)
    assert isinstance(optimizer, Lamb)
    values = {"weight": torch.full((2, 3), 2.0).double(), "bias": torch.ones(2).double()}
    moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in values.items()}
    torch.manual_seed(0)
    for step in (1, 2):
        for name, p in layer.named_parameters():
            p.grad = torch.randn_like(p)
            g, (m, v) = p.grad.double(), moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6)
            if name == "weight":
                update = update + 0.01 * values[name]
                update = update * values[name].norm() / update.norm()
            values[name] = values[name] - 0.1 * update
        optimizer.step()
        for name, p in layer.named_parameters():
            assert torch.allclose(p.double(), values[name], atol=1e-5), (step, name)


def test_lamb_moves_weights_that_are_zero() -> None:
    layer = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(OptimConfig(optimizer="lamb", lr=0.1), layer)
    layer.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.allclose(layer.weight, torch.full((2, 3), -0.1), atol=1e-4)


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_a_step_left_out_changes_no_bit_and_a_saved_state_goes_on(name: str) -> None:
    config = OptimConfig(optimizer=name, weight_decay=0.1)  # type: ignore[arg-type]
    twins = [build_model(ModelConfig(model="resnet9", channels=(4, 4, 6, 8)), 3, 8, seed=0) for _ in range(2)]
    optimizers = [build_optimizer(config, twin) for twin in twins]

    def step(which: int, value: float) -> None:
        torch.manual_seed(int(value) if math.isfinite(value) else 0)
        for p in twins[which].parameters():
            p.grad = torch.randn_like(p) if math.isfinite(value) else torch.full_like(p, value)
        skip_unless(optimizers[which], torch.tensor(math.isfinite(value)))
        optimizers[which].step()

    for value in (float("nan"), 1.0, float("inf"), 2.0, float("nan")):
        step(0, value)
        if math.isfinite(value):
            step(1, value)
    saved = copy.deepcopy(optimizers[1].state_dict())
    optimizers[1] = build_optimizer(config, twins[1])
    optimizers[1].load_state_dict(saved)
    for which in (0, 1):
        step(which, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))


@pytest.mark.parametrize("kind", [Muon, Lamb])
def test_gradients_that_are_still_scaled_are_refused(kind: Any) -> None:
    layer = nn.Conv2d(3, 2, 3)
    optimizer = kind([{"params": [layer.weight], "weight_decay": 0.0, "orthogonal": True}], 0.1)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.grad_scale = torch.tensor(8.0)
    with pytest.raises(RuntimeError, match="unscaled"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "cnn",
            {
                "features.0.0.weight": 3,
                "features.0.1.bias": 3,
                "features.1.0.weight": 2,
                "head.1.bias": 1,
                "head.3.weight": 0,
            },
        ),
        (
            "resnet18",
            {"conv1.weight": 9, "bn1.weight": 9, "layer1.0.conv2.weight": 8, "layer4.1.bn2.bias": 1, "fc.bias": 0},
        ),
    ],
)
def test_blocks_are_counted_from_the_head(name: str, expected: dict[str, int]) -> None:
    found = blocks_behind(build_model(ModelConfig(model=name), 3, 8, seed=0))
    assert {parameter: found[parameter] for parameter in expected} == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb", "muon"])
def test_rates_fall_by_layer(optimizer: str) -> None:
    model = build_model(ModelConfig(model="resnet18"), 3, 8, seed=0)
    built = build_optimizer(OptimConfig(optimizer=optimizer, layer_decay=0.5), model)  # type: ignore[arg-type]
    set_learning_rate(built, 0.8)
    rates = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.fc.weight)] == 0.8
    assert rates[id(model.layer4[1].conv1.weight)] == rates[id(model.layer4[1].bn2.weight)] == 0.4
    assert rates[id(model.conv1.weight)] == 0.8 * 0.5**9


def test_the_whitening_bias_rests_after_three_eighths() -> None:
    model = build_model(ModelConfig(model="airbench", channels=(4, 4, 4)), 3, 32, seed=0)
    optimizer = build_optimizer(OptimConfig(), model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.whiten.weight) not in trained

    def rate_at(done: float) -> float:
        set_learning_rate(optimizer, 0.3, done)
        assert max(group["lr"] for group in optimizer.param_groups) == 0.3
        return next(g["lr"] for g in optimizer.param_groups if any(p is model.whiten.bias for p in g["params"]))  # type: ignore[no-any-return]

    assert [rate_at(done) for done in (0.0, 0.374, 0.375, 0.99)] == [0.3, 0.3, 0.0, 0.0]
