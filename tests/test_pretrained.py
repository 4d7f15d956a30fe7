from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from distcnn.augment import IMAGENET_MEAN
from distcnn.build import open_dataset
from distcnn.checkpoint import load, newest_whole
from distcnn.config import ModelConfig, from_flat
from distcnn.errors import UserError
from distcnn.models import build_model, build_plain
from distcnn.pretrained import begin_with, read_weights
from distcnn.train import train
from distcnn.world import World
from tests.harness import simulate, small_config, trace_of

CONFIG = ModelConfig(model="resnet9", channels=(4, 4, 6, 8))


def other_model(classes: int = 7) -> nn.Module:
    torch.manual_seed(9)
    return build_plain(CONFIG, classes, 8)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights for 7 classes."""
    path = tmp_path / "weights.pth"
    torch.save(other_model().state_dict(), path)
    return path


def wrapped_in(kind: str, state: dict[str, torch.Tensor]) -> Any:
    return {
        "plain": state,
        "torchvision": {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
        "timm": {"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}, "arch": "x"},
        "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        "ddp": {f"module.{k}": v for k, v in state.items()},
        "compiled": {f"_orig_mod.{k}": v for k, v in state.items()},
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "torchvision", "timm", "lightning", "ddp", "compiled"])
def test_weights_as_others_save_them(kind: str, tmp_path: Path) -> None:
    state = other_model().state_dict()
    torch.save(wrapped_in(kind, state), tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], v + 1 if kind == "timm" else v) for k, v in state.items())


def test_all_but_the_head_is_taken_where_the_classes_are_others(weights: Path) -> None:
    model, source = build_model(CONFIG, 5, 8, seed=0), other_model().state_dict()
    head = model.head.weight.clone()
    told = begin_with(model, read_weights(weights), "w")
    assert torch.equal(model.head.weight, head)
    assert all(torch.equal(v, source[k]) for k, v in model.state_dict().items() if k != "head.weight")
    assert str(told) == f"{len(source) - 1} tensors loaded; drawn anew, since the classes are others: head.weight"
    same = build_model(CONFIG, 7, 8, seed=0)
    assert str(begin_with(same, read_weights(weights), "w")) == f"{len(source)} tensors loaded"
    assert torch.equal(same.head.weight, source["head.weight"])


def test_every_name_that_is_missing_or_too_much_is_told(weights: Path) -> None:
    found = read_weights(weights)
    del found["features.2.layers.0.1.weight"], found["features.2.layers.0.1.num_batches_tracked"]
    found["more"] = torch.zeros(1)
    told = str(begin_with(build_model(CONFIG, 7, 8, seed=0), found, "w"))
    assert "not in the file: features.2.layers.0.1.weight; in the file but not in the network: more" in told


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


def test_what_is_no_weights_is_refused_by_name(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_bytes(b"text that is long enough to be a header")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"lr": 3}, tmp_path / "odd.pth")
    for name, said in (
        ("missing.pth", "cannot be read: No such file"),
        ("empty.pth", "holds no plain weights"),
        ("text.safetensors", "holds no plain weights"),
        ("trap.pth", "holds no plain weights"),
        ("list.pth", "holds no weights, but a list"),
        ("odd.pth", "holds no weights: 'lr' is a int"),
        (".", "holds no checkpoint"),
    ):
        with pytest.raises(UserError) as caught:
            read_weights(tmp_path / name)
        assert said in str(caught.value) and str(tmp_path) in str(caught.value), name
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (ModelConfig(model="resnet9", channels=(4, 4, 6, 10)), "has the shape (8, 6, 3, 3), and (10, 6, 3, 3) here"),
        (ModelConfig(model="resnet18"), "has none of the network's names, such as conv1.weight"),
    ],
)
def test_weights_of_another_network_change_nothing(model: ModelConfig, said: str, weights: Path) -> None:
    mine = build_model(model, 5, 32, seed=0)
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    with pytest.raises(UserError) as caught:
        begin_with(mine, read_weights(weights), "w.pth")
    assert said in str(caught.value) and "--pretrained w.pth" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())


def test_a_run_begins_with_another_runs_weights_and_resumes_without_them(stripes_set: Path, tmp_path: Path) -> None:
    first = small_config(stripes_set, tmp_path / "first", epochs=1, flip="none")
    train(first, World())
    made = load(newest_whole(tmp_path / "first")[0])  # type: ignore[arg-type]
    safetensors.torch.save_file({k: v + 0.5 for k, v in (made.ema or {}).items()}, tmp_path / "w.safetensors")
    values: dict[str, Any] = {"pretrained": str(tmp_path / "first"), "freeze": "backbone", "checkpoint_every": 1}
    for name, ranks in (("one", 1), ("four", 4)):
        simulate(small_config(stripes_set, tmp_path / name, **values), ranks)
    assert trace_of(tmp_path / "one") == trace_of(tmp_path / "four")
    ended = load(newest_whole(tmp_path / "one")[0]).model  # type: ignore[arg-type]
    kept = [k for k in ended if torch.equal(ended[k], (made.ema or {})[k])]
    assert set(ended) - set(kept) == {"head.4.weight", "head.4.bias"}


def test_pixels_are_normalised_as_the_weights_expect(stripes_set: Path, weights: Path, tmp_path: Path) -> None:
    own = open_dataset(from_flat({"data": str(stripes_set)}), World())
    other = open_dataset(from_flat({"data": str(stripes_set), "pretrained": str(weights)}), World())
    assert own.mean != other.mean == IMAGENET_MEAN
    train(small_config(stripes_set, tmp_path / "run", epochs=1, pretrained="", batch_norm="tile"), World())
    again = open_dataset(from_flat({"data": str(stripes_set), "pretrained": str(tmp_path / "run")}), World())
    assert (again.mean, again.std) == (own.mean, own.std)
