"""Layer by layer, and what a replay concludes. Boxes of real runs: faults/test_not_finite.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distcnn.augment import Targets
from distcnn.blackbox import _json
from distcnn.errors import UserError
from distcnn.layers import Examination, Layer, examine
from distcnn.losses import Loss
from distcnn.replay import Box, Replay, TileAgain
from distcnn.state import Position

OFF = torch.autocast("cpu", enabled=False)


class Net(nn.Module):
    """Convolution, ReLU used twice, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.last(self.relu(self.relu(self.first(x_NCHW)).mean((2, 3))))  # type: ignore[no-any-return]


def look(model: nn.Module, x_NCHW: torch.Tensor, samples: int = 4) -> Examination:
    labels = torch.tensor([0, 1] * (len(x_NCHW) // 2))
    targets = Targets(labels, labels, 1.0, torch.ones(len(labels)))
    return examine(model, x_NCHW, targets, Loss(), samples, OFF)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x_NCHW() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_every_call_of_a_layer_is_a_row_with_its_norms(net: Net, x_NCHW: torch.Tensor) -> None:
    found = look(net, x_NCHW)
    assert [(layer.name, layer.kind) for layer in found.layers] == [
        ("first", "Conv2d"), ("relu", "ReLU"), ("relu", "ReLU"), ("last", "Linear"),
    ]  # fmt: skip
    first, logits = found.layers[0], found.layers[-1]
    output = net.first(x_NCHW).detach()
    assert first.output_norm == pytest.approx(output.norm().item(), rel=1e-5)
    assert first.output_max == pytest.approx(output.abs().max().item(), rel=1e-6)
    weights = torch.cat([net.last.weight.flatten(), net.last.bias]).detach()
    assert logits.weight_norm == pytest.approx(weights.norm().item(), rel=1e-5)
    expected = nn.functional.cross_entropy(net(x_NCHW), torch.tensor([0, 1, 0, 1]))
    assert found.loss == pytest.approx(expected.item(), rel=1e-5) and found.origin == ""
    assert not any(layer.bad_outputs or layer.bad_gradients or layer.bad_weights for layer in found.layers)
    assert not any(module._forward_hooks for module in net.modules()), "nothing is left in the model"


def test_gradients_add_up_in_the_model_and_each_tile_has_its_own(net: Net, x_NCHW: torch.Tensor) -> None:
    one = look(net, x_NCHW).layers[0].gradient_norm
    two = look(net, x_NCHW).layers[0].gradient_norm
    assert two == pytest.approx(one, rel=1e-4)
    assert net.first.weight.grad is not None and net.first.bias.grad is not None
    both = torch.cat([net.first.weight.grad.flatten(), net.first.bias.grad])
    assert both.norm().item() == pytest.approx(2 * one, rel=1e-4)


def poison(net: Net, what: str) -> None:
    with torch.no_grad():
        if what == "weight":
            net.last.weight[0, 0] = math.nan
        elif what == "overflow":
            net.first.weight.mul_(1e38)
        elif what == "logits":  # finite, but their difference is not
            net.last.weight.zero_()
            net.last.bias.copy_(torch.tensor([3e38, -3e38]))


@pytest.mark.parametrize(
    ("what", "origin"),
    [
        ("weight", "last (Linear): its weights are not finite"),
        ("overflow", "first (Conv2d): its output is not finite"),
        ("logits", "the loss: all layers are finite"),
    ],
)
def test_where_it_comes_from(net: Net, x_NCHW: torch.Tensor, what: str, origin: str) -> None:
    poison(net, what)
    found = look(net, x_NCHW * (100 if what == "overflow" else 1))
    assert found.origin == origin and not (math.isfinite(found.loss) and what == "logits")


def test_a_gradient_that_alone_is_not_finite() -> None:
    """The square root of 0 has the value 0 and an infinite slope."""

    class Root(Net):
        def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x_NCHW).mean((2, 3)).abs().sqrt())  # type: ignore[no-any-return]

    root = Root()
    with torch.no_grad():
        root.first.weight.zero_()
        root.first.bias.zero_()
    found = look(root, torch.ones(4, 3, 6, 6))
    assert math.isfinite(found.loss) and found.origin == "first (Conv2d): the gradient of its weights is not finite"


def tile(lane: int, then: float | None, now: float, bad: int = 0) -> TileAgain:
    layer = Layer("conv", "Conv2d", 1.0, 1.0, bad, 1.0, 0, 1.0, 0)
    return TileAgain(lane, lane // 2, then, Examination(now, (layer,)), ())


def replayed(*tiles: TileAgain, norm: float = 1.0, later: int = 0) -> Replay:
    return Replay(Box(Position(0, 3, 3, 9), "f", later, "step_00000002"), tiles, norm)


NAN, GOOD = math.nan, tile(0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("found", "worst", "said"),
    [
        (replayed(GOOD, tile(1, NAN, NAN, bad=2), norm=NAN), 1, "reproduced: not finite here either, first in conv"),
        (replayed(GOOD, tile(1, 1.0, 1.0), norm=math.inf), 0, "the sum over the tiles: each is finite by itself"),
        (replayed(GOOD, tile(3, NAN, 1.0)), 3, "not reproduced: the loss was not finite in lane 3 of rank 1"),
        (replayed(GOOD, tile(1, None, 1.0)), 0, "not reproduced: the gradient was not finite there"),
        (replayed(tile(0, NAN, 1.0), later=2), 0, "not reproduced, but the weights are those 2 steps later: go on"),
    ],
)
def test_what_a_replay_concludes(found: Replay, worst: int, said: str) -> None:
    assert found.worst.lane == worst and said in found.verdict() and "\n" not in found.verdict()


def test_boxes_are_strict_json() -> None:
    text = _json({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf, "e": "ä\udcff"}})
    found: Any = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": "nan", "b": ["inf", 1.5], "c": {"d": "-inf", "e": "ä\udcff"}}


@pytest.mark.parametrize("row", [{}, {"position": 3}, {"position": {"epoch": "x"}}, {"position": {"epoch": -1}}])
def test_a_damaged_box_is_said(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is no black box"):
        Box.read(tmp_path / "none")
    (tmp_path / "box.json").write_text(json.dumps({"version": 1, **row}))
    with pytest.raises(UserError, match=r"box\.json is damaged"):
        Box.read(tmp_path)
