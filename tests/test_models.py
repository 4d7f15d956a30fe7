# N batch, C channel, K classes
from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18

from distcnn.batchnorm import FrozenBatchNorm2d, TileBatchNorm2d
from distcnn.config import ModelConfig
from distcnn.errors import UserError
from distcnn.models import build_model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "size", "count"),
    [
        # Counted by hand: convolutions k k in out (+ out), norms 2 out, linear layers in out + out.
        (ModelConfig(channels=(4,), hidden=0), 8, 9 * 3 * 4 + 8 + 4 * 16 * 5 + 5),
        (ModelConfig(channels=(4,), hidden=6, norm="none"), 8, 9 * 3 * 4 + 4 + 64 * 6 + 6 + 6 * 5 + 5),
        (ModelConfig(channels=(4, 6), hidden=0, kernel_size=1), 7, 12 + 8 + 24 + 12 + 6 * 5 + 5),
        (ModelConfig(channels=(2, 2, 2, 2, 2), hidden=0), 8, 9 * 3 * 2 + 4 + 4 * (9 * 4 + 4) + 2 * 5 + 5),  # below 1 px
        (ModelConfig(channels=(2,), hidden=0), 1, 9 * 3 * 2 + 4 + 2 * 5 + 5),
        (ModelConfig(), 8, 53_029),
    ],
)
def test_the_cnn_has_the_layers_that_the_config_says(config: ModelConfig, size: int, count: int) -> None:
    model = build_model(config, 5, size, seed=0)
    assert parameters(model) == count
    assert model(torch.zeros(3, 3, size, size)).shape == (3, 5)


@pytest.mark.parametrize("pooling", ["max", "avg", "stride"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_every_kind_of_cnn_learns_something(pooling: str, activation: str, size: int) -> None:
    config = ModelConfig(channels=(3, 4), hidden=5, pooling=pooling, activation=activation, dropout=0.1)  # type: ignore[arg-type]
    model = build_model(config, 3, size, seed=0)
    model(torch.randn(4, 3, size, size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    one = build_model(ModelConfig(), 5, 8, seed=3).state_dict()
    torch.randn(7)
    again = build_model(ModelConfig(), 5, 8, seed=3).state_dict()
    other = build_model(ModelConfig(), 5, 8, seed=4).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["features.0.0.weight"], other["features.0.0.weight"])


@pytest.mark.parametrize(("name", "builder"), [("resnet18", resnet18), ("mobilenet_v3_small", mobilenet_v3_small)])
def test_torchvision_models_keep_their_names_and_weights(name: str, builder: type) -> None:
    """A checkpoint of ours loads into a plain torchvision model and computes the same."""
    model = build_model(ModelConfig(model=name, stem="auto"), 7, 64, seed=0)
    torch.manual_seed(0)
    plain = builder(num_classes=7, **({"zero_init_residual": True} if name.startswith("resnet") else {}))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items()), "and the same start"
    plain.load_state_dict(model.state_dict())
    image_NCHW = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model.eval()(image_NCHW), plain.eval()(image_NCHW), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stem", "small"), [(32, "auto", True), (63, "auto", True), (64, "auto", False), (64, "small", True)]
)
def test_small_images_have_a_small_stem(size: int, stem: str, small: bool) -> None:
    model = build_model(ModelConfig(model="resnet18", stem=stem), 3, size, seed=0)  # type: ignore[arg-type]
    assert model.conv1.weight.shape[-1] == (3 if small else 7)
    assert isinstance(model.maxpool, nn.Identity) == small
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)


@pytest.mark.parametrize(("kind", "wanted"), [("tile", TileBatchNorm2d), ("frozen", FrozenBatchNorm2d)])
def test_every_batch_norm_is_converted(kind: str, wanted: type) -> None:
    model = build_model(ModelConfig(model="resnet18", batch_norm=kind), 3, 32, seed=0)  # type: ignore[arg-type]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and all(type(m) is wanted for m in norms)


def test_weights_are_in_channels_last() -> None:
    weight = build_model(ModelConfig(channels=(8, 16)), 3, 8, seed=0).features[1][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ModelConfig(model="resnet81"), "--model resnet81: not known; did you mean 'resnet18'?"),
        (ModelConfig(model="cnm"), "--model cnm: not known; did you mean 'cnn'?"),
        (ModelConfig(model="googlenet"), "--model googlenet: not known"),  # has auxiliary outputs
        (ModelConfig(model="__init__"), "--model __init__: not known"),
        (ModelConfig(model="mobilenet_v2", stem="small"), "--stem small is for ResNets, not for mobilenet_v2"),
    ],
)
def test_a_model_that_is_not_known(config: ModelConfig, said: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(config, 3, 32, seed=0)
    assert said in str(caught.value)
