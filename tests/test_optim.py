from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distcnn.config import ModelConfig, OptimConfig
from distcnn.models import build_model
from distcnn.optim import Schedule, build_optimizer, build_schedule, set_learning_rate, skip_unless

HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (Schedule(1.0, 10, 2, "cosine"), [0, 1, 2, 4, 6, 8, 10], [0.5, 1, 1, (1 + HALF) / 2, 0.5, (1 - HALF) / 2, 0]),
        (Schedule(2.0, 10, 0, "linear"), [0, 1, 5, 9, 10, 11], [2, 1.8, 1, 0.2, 0, 0]),
        (Schedule(3.0, 10, 4, "constant"), [0, 3, 4, 9, 100], [0.75, 3, 3, 3, 3]),
        (Schedule(1.0, 4, 4, "cosine"), [0, 3, 4], [0.25, 1, 1]),  # nothing but warm-up
        (Schedule(1.0, 1, 1, "linear"), [0], [1]),
        (Schedule(1.0, 1, 0, "cosine"), [0], [1]),
        (Schedule(9.0, 9, 0, "step"), [0, 2, 3, 5, 6, 8, 20], [9, 9, 0.9, 0.9, 0.09, 0.09, 0.09]),
        (Schedule(1.0, 10, 2, "step"), [0, 1, 2, 4, 7], [0.5, 1, 1, 0.1, 0.01]),
        (Schedule(1.0, 10, 4, "one-cycle"), [0, 2, 4, 7, 10, 11], [0.04, 0.52, 1, 0.500002, 4e-6, 4e-6]),
        (Schedule(1.0, 4, 0, "one-cycle"), [0, 2, 4], [1, 0.500002, 4e-6]),
    ],
)
def test_schedule(schedule: Schedule, steps: list[int], expected: list[float]) -> None:
    assert [schedule(step) for step in steps] == pytest.approx(expected, abs=1e-15)


def test_schedule_is_pinned_to_the_bit() -> None:
    """A change of the last bit would change every run."""
    curve = build_schedule(OptimConfig(epochs=3, warmup_epochs=1.0, lr=3e-3), 4)
    assert [curve(step).hex() for step in (0, 3, 5, 11)] == [
        "0x1.89374bc6a7efap-11",
        "0x1.89374bc6a7efap-9",
        "0x1.7a4007054f2aap-9",
        "0x1.dee8982b189f4p-14",
    ]


@pytest.mark.parametrize(
    ("warmup_epochs", "steps_per_epoch", "warmup"), [(0.0, 7, 0), (1.0, 7, 7), (0.5, 7, 4), (1.5, 1, 2), (0.01, 7, 0)]
)
def test_warm_up_in_steps(warmup_epochs: float, steps_per_epoch: int, warmup: int) -> None:
    built = build_schedule(OptimConfig(warmup_epochs=warmup_epochs), steps_per_epoch)
    assert (built.warmup, built.total) == (warmup, 20 * steps_per_epoch)


def test_one_cycle_is_torchs_own() -> None:
    """Torch's last step has the lowest rate, ours comes one before it: so torch's is given one step more."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, 41, pct_start=11 / 41, cycle_momentum=False)
    ours = Schedule(2.0, 40, 10, "one-cycle")
    seen = []
    for _ in range(40):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [ours(step) for step in range(40)] == pytest.approx(seen)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_decay_on_biases_and_norms(name: str) -> None:
    config = OptimConfig(optimizer=name, weight_decay=0.5, lr=0.1, momentum=0.0)  # type: ignore[arg-type]
    model = build_model(ModelConfig(channels=(4,), hidden=3), 2, 4, seed=0)
    optimizer = build_optimizer(config, model)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decayed) == len(names), "each parameter once"
    for parameter, decay in decayed.items():
        assert decay == (0.5 if parameter in ("features.0.0.weight", "head.1.weight", "head.3.weight") else 0), (
            parameter
        )
    with torch.no_grad():  # what a step with no gradient at all does: decay, and nothing else
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for parameter, p in model.named_parameters():
        wanted = 0.95 if decayed[parameter] else 1.0
        assert torch.allclose(p, torch.full_like(p, wanted)), parameter


def test_sgd_is_nesterov_by_hand() -> None:
    config = OptimConfig(optimizer="sgd", momentum=0.9, weight_decay=0.1, lr=0.5)
    layer = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(config, layer)
    nn.init.constant_(layer.weight, 2.0)
    w, velocity = 2.0, 0.0
    for step, gradient in enumerate((1.0, -3.0, 0.5)):
        lr = 0.5 / (step + 1)
        set_learning_rate(optimizer, lr)
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        g = gradient + 0.1 * w
        velocity = 0.9 * velocity + g
        w -= lr * (g + 0.9 * velocity)
        assert layer.weight.item() == pytest.approx(w, rel=1e-6)


def test_sgd_without_momentum_and_a_model_of_biases_only() -> None:
    model = nn.BatchNorm2d(3)
    optimizer = build_optimizer(OptimConfig(optimizer="sgd", momentum=0.0), model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_is_left_out(name: str) -> None:
    """Neither weights nor momenta nor counts move; the next step is a step as ever."""
    twins = [nn.Linear(3, 2), nn.Linear(3, 2)]
    twins[1].load_state_dict(twins[0].state_dict())
    optimizers = [build_optimizer(OptimConfig(optimizer=name), twin) for twin in twins]  # type: ignore[arg-type]

    def step(which: int, value: float) -> None:
        for p in twins[which].parameters():
            p.grad = torch.full_like(p, value)
        skip_unless(optimizers[which], torch.tensor(math.isfinite(value)))
        optimizers[which].step()

    for value in (1.0, float("nan"), 2.0, float("inf"), 3.0):
        step(0, value)
        if math.isfinite(value):
            step(1, value)
    assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
