from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from data_sets import example_set, look, make_set, many, printed, rendered, texts
from PIL import Image
from shard_files import encode, jpg, picture, write_tar

from distcnn.cli import main
from distcnn.data.index import IndexRequest, index_data_set
from distcnn.data.inspect.advice import training_side
from distcnn.data.inspect.facts import Facts, inspect_data_set
from distcnn.data.inspect.pictures import samples_of_classes
from distcnn.data.inspect.scan import kind_of
from distcnn.data.labels import parse_rule
from distcnn.data.manifest import load_manifest


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Facts]:
    return example_set(tmp_path_factory.mktemp("set"))


# ---- facts ----


def test_counts_sizes_and_formats(example: tuple[Path, Facts]) -> None:
    root, facts = example
    train, val = facts.splits
    assert (facts.images, train.images, val.images) == (25, 18, 7)
    assert (train.class_counts.tolist(), val.class_counts.tolist()) == ([12, 6], [3, 4])
    assert train.imbalance == 2
    assert train.formats == {("PNG", "RGB"): 13, ("JPEG", "RGB"): 4, ("PNG", "gray"): 1}
    assert val.formats[("WEBP", "RGB")] == 4
    assert facts.uniform is None
    with tarfile.open(root / "train-0.tar") as tar:
        assert train.bytes == train.class_bytes.sum() == sum(member.size for member in tar.getmembers())
    assert facts.columns.gray.sum() == 2
    assert facts.extremes["Brightest"][0] == facts.columns.brightness.argmax()
    assert facts.columns.brightness[facts.extremes["Darkest"][0]] == 0
    assert facts.columns.height[facts.extremes["Smallest"][0]] == 9


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    images = [picture(seed, 32, 32) for seed in range(9)]
    facts = look(make_set(tmp_path, {"train": [(f"a/{n}.png", encode(image)) for n, image in enumerate(images)]}))
    pixels = np.stack(images) / 255
    assert np.allclose(facts.splits[0].mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    assert np.allclose(facts.splits[0].std, pixels.std(axis=(0, 1, 2)), atol=1e-6)
    assert np.abs(facts.mean_image - 255 * pixels.mean(axis=0)).max() <= 0.51
    assert facts.uniform == (32, 32)
    assert facts.splits[0].brightness == pytest.approx((pixels @ [0.299, 0.587, 0.114]).mean(), abs=1e-5)


def test_samples_are_of_their_class_and_split(example: tuple[Path, Facts]) -> None:
    facts = example[1]
    for split, sizes in (("train", [8, 6]), ("val", [3, 4])):
        samples = samples_of_classes(facts, split)
        assert [len(places) for _, places in samples] == sizes
        for label, places in samples:
            assert (facts.columns.label[places] == label).all()
            assert facts.of_split(split)[places].all()


def test_copies_leaks_and_wrong_labels(example: tuple[Path, Facts]) -> None:
    like = example[1].likeness
    assert like.copies == 2
    assert like.near == 1
    assert (like.conflicts, like.conflicts_exact) == (1, 1)
    assert [(leak.split, leak.other, leak.exact, leak.near) for leak in like.leaks] == [("val", "train", 1, 1)]
    assert [len(group) for group in like.groups] == [2, 2, 2]
    advice = texts(example[1], "warning")
    assert "val shares 2 images with train (28.6 % of val): 1 of the same bytes, 1 that look alike" in advice
    assert "1 pair of the same bytes have different labels" in advice


def test_processes_see_what_one_process_sees(example: tuple[Path, Facts], monkeypatch: pytest.MonkeyPatch) -> None:
    root, facts = example
    monkeypatch.setattr("distcnn.data.inspect.scan.BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr("distcnn.data.sweep.CHUNK_IMAGES", 5)
    again = inspect_data_set(root, load_manifest(root), workers=2)
    for name in facts.columns.__dataclass_fields__:
        assert (getattr(again.columns, name) == getattr(facts.columns, name)).all(), name
    assert [split.mean for split in again.splits] == [split.mean for split in facts.splits]
    assert again.likeness.pairs.tolist() == facts.likeness.pairs.tolist()


def test_images_that_do_not_decode_are_named_not_fatal(tmp_path: Path) -> None:
    members = [("a/1.png", encode(picture(1))), ("a/2.jpg", b"text"), ("b/3.png", encode(picture(3))), ("b/4.png", b"")]
    root = make_set(tmp_path, {"train": members})
    facts = look(root)
    assert facts.images == 2
    assert facts.undecodable == (("train", "train-0.tar/a/2", "not an image in JPEG, PNG, WEBP, GIF, BMP, TIFF"),)
    assert "1 image of the set cannot be decoded" in texts(facts, "warning")
    assert "train-0.tar/b/4.png" in printed(facts)
    html = rendered(root, facts)
    assert "train-0.tar/a/2" in html
    assert "0 bytes" in html


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (jpg(), ("JPEG", "RGB")),
        (encode(Image.new("L", (3, 3)), "JPEG"), ("JPEG", "gray")),
        (encode(Image.new("CMYK", (3, 3)), "JPEG"), ("JPEG", "CMYK")),
        (encode(Image.new("P", (3, 3))), ("PNG", "palette")),
        (encode(Image.new("RGBA", (3, 3))), ("PNG", "RGBA")),
        (encode(Image.new("LA", (3, 3))), ("PNG", "gray + alpha")),
        (encode(np.zeros((3, 3), np.uint16)), ("PNG", "gray 16 bit")),
        (encode(Image.new("RGBA", (3, 3), (1, 2, 3, 4)), "WEBP"), ("WEBP", "RGBA")),
        (encode(Image.new("P", (3, 3)), "GIF"), ("GIF", "palette")),
        (encode(Image.new("1", (3, 3)), "BMP"), ("BMP", "1 bit")),
    ],
)
def test_kinds(data: bytes, expected: tuple[str, str]) -> None:
    assert kind_of(data) == expected


# ---- advice ----


@pytest.mark.parametrize(
    ("splits", "level", "message"),
    [
        ({"train": many("a", 40) + many("b", 3, 50)}, "warning", "Imbalance 13.3: 'a' has 40 images, 'b' 3"),
        ({"train": many("a", 40) + many("b", 20, 50)}, "notice", "Imbalance 2.0"),
        ({"train": many("a", 20) + many("b", 20, 50)}, "good", "balanced"),
        ({"train": many("a", 20) + many("b", 19, 50)}, "notice", "Fewer than 20 training images of 'b'"),
        ({"train": many("a", 3)}, "warning", "one class only"),
        ({"train": many("a", 3), "val": many("b", 2, 9)}, "warning", "No image in train of 'b'"),
        ({"train": many("a", 3), "val": many("b", 2, 9)}, "warning", "val has classes that train lacks"),
        ({"train": many("a", 3), "val": many("a", 2, 9)}, "good", "No image is in two splits"),
        ({"train": many("a", 3)}, "notice", "neither a val nor a test split"),
        ({"train": many("a", 3), "test": many("a", 1, 9)}, "good", "All images are 8 x 8: train at --image-size 8"),
        ({"train": [many("a", 1), many("a", 2, 2)]}, "notice", "2 shards in train"),
        ({"train": [many("a", 1, n) for n in range(8)]}, "good", "8 shards in train keep 8 ranks"),
        ({"train": [many("a", 1), many("a", 1, 9), many("a", 12, 20)]}, "notice", "Shards hold 1 to 12 samples"),
        (
            {"train": many("a", 3), "val": [("a/1.png", encode(np.full((8, 8, 3), 255, np.uint8)))]},
            "notice",
            "mean colours of val and train",
        ),
        ({"train": [("a/1.png", encode(np.zeros((8, 8), np.uint8)))]}, "notice", "All images are gray"),
    ],
)
def test_advice(tmp_path: Path, splits: dict[str, Any], level: str, message: str) -> None:
    assert message in texts(look(make_set(tmp_path, splits)), level)


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(28, 28)], 28),
        ([(128, 128)], 128),
        ([(640, 480)], 224),
        ([(500, 375), (375, 500), (90, 80)], 224),
        ([(100, 100), (110, 140)], 96),
        ([(9, 9), (10, 12)], 32),
    ],
)
def test_side_to_train_at(tmp_path: Path, sizes: list[tuple[int, int]], side: int) -> None:
    members = [(f"a/{n}.png", encode(Image.new("L", sizes[n]))) for n in range(len(sizes))]
    assert training_side(look(make_set(tmp_path, {"train": members}))) == side


# ---- unusual sets ----


@pytest.mark.parametrize(
    ("splits", "label"),
    [
        ({"train": many("a", 1)}, "folder"),
        ({"train": many("a", 1)}, "none"),
        ({"predict": many("a", 2)}, "none"),
        ({"train": [many("a", 1), many("b", 30, 1)], "test": many("b", 1, 40)}, "folder"),
        ({"train": [item for n in range(70) for item in many(f"c{n:03d}", 1, n)]}, "folder"),
        ({f"s{n}": many("a", 1, n) + many("b", 1, n + 20) for n in range(7)}, "folder"),
    ],
)
def test_unusual_sets_are_shown(tmp_path: Path, splits: dict[str, Any], label: str) -> None:
    root = make_set(tmp_path, splits, label)
    facts = look(root)
    assert printed(facts)
    assert "</html>" in rendered(root, facts)


def test_a_remote_set(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", many("a", 3) + many("b", 3, 9))
    with fsspec.open("memory://inspect/a.tar", "wb") as file:
        file.write(path.read_bytes())
    root = tmp_path / "set"
    index_data_set(IndexRequest(root, {"train": ["memory://inspect/a.tar"]}, rule=parse_rule("folder"), workers=1))
    facts = look(root)
    assert facts.images == 6
    assert "memory://inspect/a.tar/b/0" in rendered(root, facts)


# ---- the command ----


def test_the_command(example: tuple[Path, Facts], capsys: pytest.CaptureFixture[str]) -> None:
    root, _ = example
    assert main(["inspect", str(root), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "val shares 2 images with train" in out
    assert "</html>" in (root / "inspect.html").read_text()
    other = root / "other.html"
    assert main(["inspect", str(root / "dataset.json"), "--output", str(other), "--workers", "1"]) == 0
    assert other.read_text() == (root / "inspect.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/no"], "no dataset.json in"),
        (["{root}", "--output", "{root}"], "is a folder"),
        (["{root}", "--output", "{root}/no/x.html"], "cannot write"),
    ],
)
def test_the_command_refuses_in_one_line(
    example: tuple[Path, Facts], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["inspect", *(word.format(root=example[0]) for word in words), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_shard_that_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_set(tmp_path, {"train": many("a", 2)})
    (root / "train-0.tar").unlink()
    assert main(["inspect", str(root), "--workers", "1"]) == 2
    assert "train-0.tar is missing" in capsys.readouterr().err
