# N batch, C channel, H W pixels, K classes
from __future__ import annotations

import pytest
import torch
from torch import nn

from distcnn.config import ModelConfig
from distcnn.errors import UserError
from distcnn.fastnets import first_stride
from distcnn.models import blur, build_model, build_plain, head_of


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (32, 1), (47, 1), (48, 2), (64, 2), (95, 2), (96, 4), (224, 4)])
def test_the_layers_behind_the_first_see_about_32_px(size: int, stride: int) -> None:
    assert first_stride(size) == stride
    model = build_plain(ModelConfig(model="resnet9"), 3, size)
    assert model.features[0](torch.zeros(1, 3, size, size)).shape[-2:] == (size // stride, size // stride)


@pytest.mark.parametrize("size", [1, 7, 8, 32, 33, 64, 96, 127, 128])
def test_resnet9_takes_images_of_any_size(size: int) -> None:
    model = build_model(ModelConfig(model="resnet9", channels=(4, 6, 8, 8)), 3, size, seed=0)
    for side in (size, size + 5):
        model.train()(torch.randn(2, 3, side, side)).sum().backward()
        assert model(torch.randn(2, 3, side, side)).shape == (2, 3)


def test_the_parameters_are_those_of_the_papers() -> None:
    """Counted from the layers: convolutions 9 in out, norms 2 out (half of it constant in airbench), linear in out."""
    model = build_plain(ModelConfig(model="resnet9"), 10, 32)
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    assert parameters(model) == sum(9 * i * o + 2 * o for i, o in convolutions) + 512 * 10
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == 8
    air = build_plain(ModelConfig(model="airbench"), 10, 32)
    convolutions = [(24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)]
    assert parameters(air) == sum(9 * i * o + 2 * o for i, o in convolutions) + (12 * 24 + 24) + 2560
    assert (
        sum(p.numel() for p in air.parameters() if p.requires_grad)
        == parameters(air) - 12 * 24 - 2 * 2 * (64 + 256 + 256) // 2
    )


def test_airbench_begins_as_its_paper_says() -> None:
    model = build_model(ModelConfig(model="airbench"), 10, 32, seed=0)
    assert not model.whiten.weight.requires_grad and model.whiten.bias.requires_grad
    conv = model.layers[2].conv1  # 64 -> 256: the first 64 outputs are the inputs
    x_NCHW = torch.randn(2, 64, 8, 8)
    assert torch.allclose(conv(x_NCHW)[:, :64], x_NCHW, atol=1e-6)
    assert not torch.allclose(conv(x_NCHW)[:, 64:128], x_NCHW, atol=0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6 and all(m.momentum == 0.4 and not m.weight.requires_grad for m in norms)
    assert model.head.weight.std().item() == pytest.approx(1.0) and model.head.bias is None
    features_NC = model.layers(model.whiten(torch.randn(2, 3, 32, 32)))
    assert features_NC.shape == (2, 256, 3, 3)


@pytest.mark.parametrize(
    ("values", "size", "said"),
    [
        ({"model": "airbench"}, 15, "--model airbench needs 16 px or more, these are 15: --model resnet9"),
        ({"model": "resnet9", "channels": (4, 4)}, 32, "--channels 4 4: --model resnet9 has 4 groups of layers"),
        ({"model": "airbench", "channels": (4,) * 4}, 32, "--channels 4 4 4 4: --model airbench has 3 groups"),
        ({"model": "resnet99"}, 32, "--model resnet99: not known; did you mean 'resnet9'?"),
        ({"model": "timm:resnet5o"}, 32, "--model timm:resnet5o: timm does not know it; did you mean 'resnet50'?"),
    ],
)
def test_what_cannot_be_built(values: dict[str, object], size: int, said: str) -> None:
    if "timm:" in str(values["model"]):
        pytest.importorskip("timm")
    with pytest.raises(UserError) as caught:
        build_model(ModelConfig(**values), 3, size, seed=0)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "regnety_002"])
def test_timm_networks_are_themselves_with_batch_norm_by_tile(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = build_model(ModelConfig(model=f"timm:{name}"), 5, 64, seed=0).train()
    plain = timm.create_model(name, num_classes=5)
    plain.load_state_dict(model.state_dict())
    x_NCHW = torch.randn(4, 3, 64, 64)
    torch.manual_seed(0)
    wanted = plain.train()(x_NCHW)
    torch.manual_seed(0)
    assert torch.allclose(model(x_NCHW), wanted, atol=1e-3)
    moved = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and bool(m.running_mean.any())]
    assert not moved, "statistics move once a step, by all tiles, not by a forward pass"


class Odd(nn.BatchNorm2d):
    """Somebody's own batch norm."""


def test_batch_norm_of_an_unknown_kind_is_refused() -> None:
    from distcnn.batchnorm import convert

    with pytest.raises(UserError, match=r"layer 1 is a Odd, which distcnn does not train"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 1), Odd(3)), "tile")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("cnn", "head.3"),
        ("resnet9", "head"),
        ("airbench", "head"),
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.1"),
        ("efficientnet_b0", "classifier.1"),
    ],
)
def test_the_head_is_the_layer_that_gives_the_logits(name: str, head: str) -> None:
    model = build_plain(ModelConfig(model=name), 7, 64)
    assert head_of(model) == head
    layer = model.get_submodule(head)
    assert (layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features) == 7  # type: ignore[union-attr]


def test_a_frozen_backbone_stays() -> None:
    model = build_model(ModelConfig(model="resnet18", pretrained="x", freeze="backbone"), 3, 32, seed=0).train()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {type(m).__name__ for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {"FrozenBatchNorm2d"}


def test_blurring_before_a_stride() -> None:
    """By hand: 1 2 1 in both directions over 16, then the layer itself; the first layer sees the image as it is."""
    model = blur(nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)))
    assert [type(m).__name__ for m in model] == ["Conv2d", "BlurredConv2d", "Conv2d"]
    assert set(model.state_dict()) == {f"{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    x_NCHW = torch.randn(2, 16, 9, 9)
    padded = nn.functional.pad(x_NCHW, (1, 1, 1, 1))
    row = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
    both = (row[:, :, :-2] + 2 * row[:, :, 1:-1] + row[:, :, 2:]) / 4
    wanted = nn.functional.conv2d(both, model[1].weight, model[1].bias, 2, 1)
    assert torch.allclose(model[1](x_NCHW), wanted, atol=1e-5)
    blurred = build_model(ModelConfig(model="resnet18", blur_pool=True), 3, 64, seed=0)
    assert sum(type(m).__name__ == "BlurredConv2d" for m in blurred.modules()) == 6
