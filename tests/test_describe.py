"""Layers from shapes alone, against torchvision's published numbers, and against what gradients reach."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from distcnn.cli import main
from distcnn.config import ModelConfig, TrainConfig
from distcnn.describe import as_text, describe
from distcnn.errors import UserError
from distcnn.models import build_plain
from distcnn.shapes import LayerShape, activation_bytes, layer_shapes, meta_model


def shapes_of(size: int, model: str = "cnn", classes: int = 10, **values: object) -> list[LayerShape]:
    return describe(TrainConfig(model=ModelConfig(model=model, **values)), classes, size).layers  # type: ignore[arg-type]


def test_the_digits_network_by_hand() -> None:
    """8x8 px, blocks of 32 and 64 channels, 128 hidden units, 10 classes."""
    found = [(layer.kind, layer.output, layer.parameters, layer.multiply_adds, layer.field) for layer in shapes_of(8)]
    assert found == [
        ("conv 3x3 + norm + relu", (32, 8, 8), 3 * 32 * 9 + 2 * 32, 3 * 32 * 9 * 64, 3),
        ("max pool 2x2 /2", (32, 4, 4), 0, 0, 4),
        ("conv 3x3 + norm + relu", (64, 4, 4), 32 * 64 * 9 + 2 * 64, 32 * 64 * 9 * 16, 8),
        ("max pool 2x2 /2", (64, 2, 2), 0, 0, 10),
        ("linear + relu", (128,), 256 * 128 + 128, 256 * 128, math.inf),
        ("linear", (10,), 1290, 1280, math.inf),
    ]


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [  # torchvision's own tables, 1000 classes, 224 px
        ("resnet18", 11_689_512, 1.81),
        ("resnet50", 25_557_032, 4.09),
        ("vgg11", 132_863_336, 7.61),
        ("densenet121", 7_978_856, 2.83),
        ("mobilenet_v3_small", 2_542_856, 0.06),
        ("shufflenet_v2_x1_0", 2_278_604, 0.14),
        ("regnet_y_400mf", 4_344_144, 0.40),
        ("convnext_tiny", 28_589_128, 4.46),
    ],
)
def test_totals_are_those_that_torchvision_publishes(name: str, parameters: int, giga: float) -> None:
    found = describe(TrainConfig(model=ModelConfig(model=name)), 1000, 224)
    assert found.parameters == parameters
    assert sum(layer.multiply_adds for layer in found.layers) / 1e9 == pytest.approx(giga, abs=0.0051)


def reached(model: nn.Module, layer: str, size: int) -> int:
    """The side of what the middle value of a layer depends on: where the gradient in the input is not 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1e-3)  # nothing cancels
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # residual blocks begin with 0 there
        if isinstance(module, nn.MaxPool2d):  # a maximum would choose one of its inputs
            module.forward = nn.AvgPool2d(module.kernel_size, module.stride, module.padding).forward  # type: ignore[method-assign]
    kept: list[torch.Tensor] = []
    dict(model.named_modules())[layer].register_forward_hook(lambda module, inputs, output: kept.append(output))
    image = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    model.double().eval()(image)
    middle = kept[0].shape[-1] // 2
    (gradient,) = torch.autograd.grad(kept[0][0, 0, middle, middle], image)
    return int((gradient[0, 0] != 0).any(0).sum())


@pytest.mark.parametrize(
    ("model", "layer", "size"),
    [
        (ModelConfig(channels=(2, 2, 2), kernel_size=5), "features.2.0", 96),
        (ModelConfig(channels=(2, 2, 2), pooling="stride", activation="gelu"), "features.2.0", 64),
        (ModelConfig(channels=(2, 3), pooling="avg", norm="none"), "features.1.2", 32),
        (ModelConfig(model="resnet18", stem="imagenet"), "layer2.1.conv2", 192),
        (ModelConfig(model="resnet18", stem="small"), "layer2.1.conv2", 96),
        (ModelConfig(model="resnet18", stem="imagenet"), "layer3.0.downsample.0", 192),
    ],
)
def test_a_receptive_field_is_what_gradients_reach(model: ModelConfig, layer: str, size: int) -> None:
    """The last one is the end of a short path behind joined ones: what came before it counts in full."""
    rows = layer_shapes(meta_model(model, 5, size), 2, size)
    row = next(row for row in rows if row.name == layer)
    assert row.field == reached(build_plain(model, 5, size), layer, size) < size


def test_dilation_counts_and_the_longer_of_two_paths() -> None:
    """3 px with dilation 2: 5; stride 2 on it: 7; then 3 px with dilation 3 at a jump of 2: 7 + 12."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long = nn.Sequential(
                nn.Conv2d(3, 2, 3, dilation=2), nn.Conv2d(2, 2, 3, 2), nn.Conv2d(2, 2, 3, dilation=3)
            )
            self.short = nn.Conv2d(3, 2, 1)
            self.end = nn.Conv2d(2, 2, (1, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            deep = self.long(x)
            side = deep.shape[-1]
            joined: torch.Tensor = self.end(self.short(x)[:, :, :side, :side] + deep)
            return joined.mean((2, 3))

    found = layer_shapes(Two().to("meta"), 2, 40)
    assert [row.field for row in found] == [5, 7, 19, 1, 19 + 2 * 2]
    assert [row.kind for row in found][:2] == ["conv 3x3 dilation 2", "conv 3x3 /2"]


@pytest.mark.parametrize(
    ("name", "size"), [("cnn", 8), ("resnet18", 33), ("mobilenet_v3_small", 64), ("vit_b_16", 224)]
)
@pytest.mark.parametrize("half", [False, True])
def test_the_rows_keep_what_the_whole_keeps(name: str, size: int, half: bool) -> None:
    model = meta_model(ModelConfig(model=name), 7, size)
    rows = layer_shapes(model, 4, size, half)
    assert sum(row.kept_bytes for row in rows) == activation_bytes(model, 4, size, half) > 0
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert all(p.device.type == "meta" for p in model.parameters())


def test_behind_attention_no_field_is_claimed() -> None:
    rows = shapes_of(224, "vit_b_16")
    assert math.isnan(rows[-3].field) and rows[0].field == 16 and rows[-1].kind == "other parameters"


def test_one_image_a_tile_and_maps_of_as_many_positions_as_images() -> None:
    """A linear layer over a map sees all of it, even where a tile has as many images as a map has positions."""
    for tile in (1, 4, 16):
        rows = layer_shapes(meta_model(ModelConfig(), 10, 8), tile, 8)
        assert rows[-2].field == math.inf and rows[-2].multiply_adds == 256 * 128


def test_the_text_compares_with_a_fully_connected_net() -> None:
    text = as_text(describe(TrainConfig(), 10, 8))
    assert "total         6 layers" in text and "53,674" in text
    hidden = 192 * 2048 + 2048
    sentence = " ".join(text.split())
    assert f"{hidden:,} fully connected (426 times as many)" in sentence and f"{hidden + 2048 * 10 + 10:,}" in text
    assert "reaches into its border" in sentence  # 10 px of 8
    assert all(len(line) <= 120 for line in text.splitlines())


def test_an_input_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"vgg11 cannot take images of 16 px: .*too small"):
        describe(TrainConfig(model=ModelConfig(model="vgg11")), 10, 16)


def test_the_command(digits_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe"]) == 0
    assert "cnn on 3 x 8 x 8, 10 classes" in capsys.readouterr().out
    assert main(["describe", "--data", str(digits_set), "--model", "resnet18", "--image-size", "32"]) == 0
    said = capsys.readouterr().out
    assert "resnet18 on 3 x 32 x 32, 10 classes" in said and "conv 3x3 + norm + relu" in said
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"data = '{digits_set}'\nchannels = [4]\ntile_size = 2\n")
    assert main(["describe", "--config", str(recipe), "--kernel-size", "5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "conv 5x5" in said and "4 x 8 x 8" in said and "tile of 2 images" in said
    for flags, message in (
        (["--model", "resnet81"], "did you mean 'resnet18'"),
        (["--image-size", "-1"], "--image-size -1: at least 0"),
        (["--kernel-size", "4"], "--kernel-size 4: must be odd"),
    ):
        assert main(["describe", *flags]) == 2
        assert message in capsys.readouterr().err
