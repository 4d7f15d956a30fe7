"""Grad-CAM against the formula written out, and pictures of networks of several families."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distcnn.augment import Augment
from distcnn.classifier import Classifier
from distcnn.cli import main
from distcnn.config import ModelConfig
from distcnn.data.views import View
from distcnn.errors import DataError, UserError
from distcnn.explain.look import grad_cam, look
from distcnn.explain.picture import CELL, contact_sheet, filter_sheet, picture
from distcnn.models import build_plain

CLASSES = ("ant", "bee", "cat $x$", "dög")
COLOURS = (0.4, 0.5, 0.3)


def classifier(name: str, size: int, gray: bool = False, **values: object) -> Classifier:
    torch.manual_seed(3)
    model = build_plain(ModelConfig(model=name, **values), len(CLASSES), size).eval()  # type: ignore[arg-type]
    mean = (0.3,) * 3 if gray else COLOURS
    augment = Augment(mean, (0.25,) * 3, seed=0)
    return Classifier(model, CLASSES, View(size, "center"), augment, torch.device("cpu"), {})


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A colourful gradient of 90x70 px."""
    rows, columns = np.mgrid[:70, :90]
    pixels = np.stack([rows * 3, columns * 2, 255 - rows - columns], axis=2).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


class Bright(nn.Module):
    """Two maps, the image's red and its negative; class 0 is their sum weighted 2 and 1, class 1 is against both."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1, bias=False)
        self.maps.weight.data = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])[:, :, None, None]
        self.act = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        sums_NC = self.act(self.maps(x_NCHW)).sum((2, 3))
        return torch.stack([2 * sums_NC[:, 0] + sums_NC[:, 1], -2 * sums_NC[:, 0]], 1)


def test_grad_cam_is_the_formula() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, 1, 2], image[0, 0, 3, 0], image[0, 0, 0, 0] = 4.0, 2.0, -1.0
    model = Bright()
    heat = grad_cam(model, image, "act", 0)
    # the mean gradients are 2 and 1: 2 * 4, 2 * 2 and 1 * 1, divided by the largest
    expected = np.zeros((4, 4), dtype=np.float32)
    expected[1, 2], expected[3, 0], expected[0, 0] = 1.0, 0.5, 0.125
    assert np.allclose(heat, expected)
    assert not grad_cam(model, image, "act", 1).any(), "only what speaks for a class"
    # before the ReLU, which changes its input in place, the maps are still the convolution's: 4 and -4 at one place,
    # with mean gradients of 2 * 2/16 and 1 * 1/16
    before = grad_cam(model, image, "maps", 0)
    assert before[1, 2] == 1.0 and before[3, 0] == pytest.approx(0.5) and before[0, 0] == 0
    assert model.maps.weight.grad is None, "nothing is left behind"


@pytest.mark.parametrize(
    ("name", "size", "layer", "stages"),
    [
        ("cnn", 8, "features.1.2", ["features.0.2", "features.1.2"]),
        ("cnn", 3, "features.0.2", ["features.0.2"]),  # 3x3, then 1x1: less than 4x4 is better than nothing
        ("resnet18", 32, "layer4", ["layer1", "layer2", "layer3", "layer4"]),
        ("resnet18", 64, "layer3", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        (
            "mobilenet_v3_small",
            64,
            "features.8",
            ["features.0", "features.1", "features.3", "features.8", "features.12"],
        ),
        ("vgg11", 64, "features.19", ["features.1", "features.4", "features.9", "features.14", "features.19"]),
        ("shufflenet_v2_x1_0", 64, "stage3", ["conv1", "stage2.0.branch2.2", "stage2", "stage3", "conv5"]),
        (
            "densenet121",
            64,
            "features.denseblock3",
            ["features.relu0", *(f"features.denseblock{n}" for n in (1, 2, 3, 4))],
        ),
        ("alexnet", 64, "features.4", ["features.1", "features.4", "features.11"]),
        ("convnext_tiny", 64, "features.5", ["features.1", "features.3", "features.5", "features.7"]),
    ],
)
def test_stages_of_networks_of_many_families(name: str, size: int, layer: str, stages: list[str], photo: Path) -> None:
    found = look(classifier(name, size), photo)
    sides = [maps.values_CHW.shape[-1] for maps in found.stages]
    assert sides == sorted(set(sides), reverse=True) and min(sides) > 1
    names = [maps.layer for maps in found.stages]
    assert found.layer == layer, names
    assert names == stages
    assert found.heat_HW.min() >= 0 and found.heat_HW.max() in (0, 1)
    assert found.pixels_SSC.shape == (size, size, 3) and len(found.top) == 4
    strongest = found.stages[0].strongest
    power = np.abs(found.stages[0].values_CHW).mean((1, 2))
    assert power[strongest[0]] == power.max() and sorted(strongest) == list(range(len(power)))


def test_what_is_asked_for_is_shown_or_refused(photo: Path) -> None:
    model = classifier("cnn", 16)
    best = look(model, photo).top[0][0]
    other = next(name for name in CLASSES if name != best)
    found = look(model, photo, other, "features.0.0")
    assert (found.wanted, found.layer) == (other, "features.0.0")
    assert found.probability == dict(found.top)[other] < found.top[0][1]
    for wanted, layer, said in (("bea", "", "did you mean 'bee'"), ("", "features.0.9", "did you mean 'features.0")):
        with pytest.raises(UserError, match=said):
            look(model, photo, wanted, layer)
    (photo.parent / "no.png").write_text("no image")
    with pytest.raises(DataError, match=r"no\.png: not an image"):
        look(model, photo.parent / "no.png")


def test_probabilities_are_those_of_predict(photo: Path) -> None:
    model = classifier("resnet18", 32)
    prediction = model.predict([photo], top_k=4)[0]
    found = look(model, photo)
    assert [name for name, _ in found.top] == list(prediction.labels)
    assert [share for _, share in found.top] == pytest.approx(prediction.probabilities)


def test_sheets() -> None:
    cells = [np.full((3, 3, 3), value, dtype=np.float32) for value in (0.0, 0.5, 0.25)]
    sheet = contact_sheet(cells, 2)
    side, gap = CELL, CELL // 12
    assert sheet.shape == (2 * side + gap, 2 * side + gap, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, -1, 0] == 0.5 and sheet[-1, 0, 0] == 0.25 and sheet[-1, -1, 0] == 1


@pytest.mark.parametrize(("gray", "spread"), [(True, True), (False, False)])
def test_filters_of_a_gray_network_are_summed(gray: bool, spread: bool, photo: Path) -> None:
    """What a filter of a gray network does shows in its sum: here that is 0 everywhere but in one place."""
    model = classifier("cnn", 16, gray=gray)
    weight = next(m for m in model.model.modules() if isinstance(m, nn.Conv2d)).weight.data
    weight.zero_()
    weight[:, 0, 0, 0], weight[:, 1, 0, 0] = 1.0, 1.0
    found = look(model, photo)
    assert found.gray == gray
    corner, middle = filter_sheet(found)[0, 0], filter_sheet(found)[CELL // 2, CELL // 2]
    if gray:
        assert corner[0] > 2 * corner[2], "red"
        assert middle == pytest.approx(0.96, abs=0.05), "white"
    else:
        assert corner.tolist() == [1.0, 1.0, 0.5] and middle.tolist() == [0.5] * 3


@pytest.mark.parametrize(("name", "size", "gray"), [("cnn", 8, True), ("resnet18", 64, False)])
def test_the_picture_is_a_png_of_sensible_size(name: str, size: int, gray: bool, photo: Path) -> None:
    data = picture(look(classifier(name, size, gray), photo))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG" and 800 <= image.width <= 1000 and 500 <= image.height <= 1400
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 500
    assert len(data) < 400_000


def test_the_command(digits_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.datasets import load_digits

    run, digit, output = tmp_path / "run", tmp_path / "digit.png", tmp_path / "why.png"
    flags = ["--data", str(digits_set), "--output", str(run), "--epochs", "2", "--ema-decay", "0.5"]
    assert main(["train", *flags, "--wandb-mode", "disabled", "--threads", "1", "--quiet"]) == 0
    digits = load_digits()
    Image.fromarray((digits.images[0] * 15).astype(np.uint8)).save(digit)
    assert main(["explain", str(run), str(digit), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "%  0\n" in said and "what speaks for '0' in features.1.2" in said
    assert output.read_bytes().startswith(b"\x89PNG")
    before = output.read_bytes()
    for words, message in (
        ([str(run), str(digit), "--class", "zero"], "--class zero: no such class"),
        ([str(run), str(tmp_path / "none.png")], "no image file"),
        ([str(run), str(digit), "--output", str(tmp_path / "a" / "b.png")], "there is no folder"),
        ([str(run), str(digit), "--output", str(tmp_path / "b.jpg")], "is a .png"),
        ([str(tmp_path / "none"), str(digit)], "no checkpoint"),
    ):
        assert main(["explain", *words]) == 2
        assert message in capsys.readouterr().err
    assert output.read_bytes() == before
