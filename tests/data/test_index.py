from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_sets import as_json, contents, index
from shard_files import encode, jpg, labelled, picture, write_tar

from distcnn.cli import main
from distcnn.data.decode import decode
from distcnn.data.index import IndexRequest, index_data_set, with_rules
from distcnn.data.labels import LabelRule, parse_rule, read_classes
from distcnn.data.manifest import load_manifest
from distcnn.data.shards import SplitReader
from distcnn.errors import DataError, UserError

# ---- what is read ----


@pytest.mark.parametrize("sizes", [[1], [3, 0, 1, 40], [1] * 9])
def test_samples_come_in_the_order_of_the_shards_however_uneven(tmp_path: Path, sizes: list[int]) -> None:
    paths, expected, start = [], [], 0
    for number, size in enumerate(sizes):
        members = labelled([i % 3 for i in range(size)], start=start)
        paths.append(write_tar(tmp_path / f"s{number}.tar", members))
        expected += [(f"{start + i:04d}", i % 3, jpg(start + i)) for i in range(size)]
        start += size
    manifest = index(tmp_path / "set", *paths, classes=("a", "b", "c"))
    assert contents(tmp_path / "set", manifest) == expected
    assert [shard.samples for shard in manifest.split("train").shards] == [size for size in sizes if size]
    assert sum(manifest.split("train").class_counts) == sum(sizes)


def test_shards_below_the_root_keep_a_relative_name_others_their_path(tmp_path: Path) -> None:
    inside = write_tar(tmp_path / "set" / "shards" / "a.tar", labelled([0]))
    outside = write_tar(tmp_path / "b.tar", labelled([1]))
    manifest = index(tmp_path / "set", inside, outside)
    assert [shard.name for shard in manifest.split("train").shards] == ["shards/a.tar", str(outside)]
    assert all(shard.index.startswith("index/train-") for shard in manifest.split("train").shards)
    assert [shard.bytes for shard in manifest.split("train").shards] == [10240, 10240]
    assert manifest.classes == ("0", "1")
    assert manifest.name == "set"
    (tmp_path / "set").rename(tmp_path / "moved")
    assert len(contents(tmp_path / "moved", load_manifest(tmp_path / "moved"))) == 2


@pytest.mark.parametrize(
    ("members", "rule", "classes", "expected"),
    [
        (labelled([2, 0]), "cls", ("0", "1", "2"), [2, 0]),
        ([("a.jpg", jpg()), ("a.cls", b" 1\n")], "cls", ("0", "1"), [1]),
        (as_json({"label": 1}), "label", ("0", "1"), [1]),
        (as_json({"label": "tit"}), "json:label", ("tit",), [0]),
        (as_json({"a": {"b": 1}}), "a.b", ("0", "1"), [1]),
        (as_json({"a": {"b": 1}, "a.b": 0}), "a.b", ("0",), [0]),
        (as_json({"cls": 1}), "json:cls", ("0", "1"), [1]),
        (as_json({}), "folder", ("d",), [0]),
        (as_json({}), "none", (), [-1]),
        (
            [("x/tit/1.jpg", jpg()), ("x/crow/1.jpg", jpg()), ("y/tit/2.png", jpg())],
            "folder",
            ("crow", "tit"),
            [1, 0, 1],
        ),
        ([("é/日本/1.jpg", jpg())], "folder", ("日本",), [0]),
    ],
)
def test_where_labels_come_from(
    tmp_path: Path, members: list[tuple[str, bytes]], rule: str, classes: tuple[str, ...], expected: list[int]
) -> None:
    path = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    manifest = index(tmp_path, path, rule=parse_rule(rule))
    assert manifest.classes == classes
    assert [label for _, label, _ in contents(tmp_path, manifest)] == expected
    assert manifest.split("train").labelled == (rule != "none")


def test_class_names_by_file_set_the_order(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("b/1.jpg", jpg()), ("a/1.jpg", jpg(1))])
    for text in ("c\nb\n\na\n", '["c", "b", "a"]', "\ufeffc\r\nb\r\na"):
        (tmp_path / "classes.txt").write_text(text)
        classes = read_classes(tmp_path / "classes.txt")
        manifest = index(tmp_path, path, rule=parse_rule("folder"), classes=classes, overwrite=True)
        assert manifest.classes == ("c", "b", "a")
        assert manifest.split("train").class_counts == (0, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "no class names"), (b"a\na\n", "'a' twice"), (b"[1", "not a JSON list"), (b"\xff\xfe", "cannot read")],
)
def test_class_files_that_cannot_be_used(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "c").write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "c")
    with pytest.raises(UserError, match="cannot read"):
        read_classes(tmp_path / "none")


def test_a_split_may_have_no_labels(tmp_path: Path) -> None:
    train = write_tar(tmp_path / "a.tar", labelled([0, 1]))
    test = write_tar(tmp_path / "t.tar", [("x.jpg", jpg())])
    request = IndexRequest(tmp_path, {"train": [str(train)], "test": [str(test)]}, workers=1)
    with pytest.raises(DataError, match=r"'x' has no \.cls.*--unlabelled"):
        index_data_set(request)
    manifest = index_data_set(with_rules(request, ["test"]))
    assert (manifest.split("train").class_counts, manifest.split("test").class_counts) == ((1, 1), ())
    assert [label for _, label, _ in contents(tmp_path, manifest, "test")] == [-1]
    with pytest.raises(UserError, match="no such split; there are train, test"):
        with_rules(request, ["tset"])


# ---- what is written, and when ----


def test_another_data_set_is_not_overwritten(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", labelled([0, 1]))
    first = index(tmp_path, path)
    with pytest.raises(UserError, match="exists: give another --output, or --overwrite"):
        index(tmp_path, path)
    assert load_manifest(tmp_path) == first
    write_tar(tmp_path / "b.tar", labelled([0]))
    second = index(tmp_path, tmp_path / "b.tar", overwrite=True)
    assert [file.name for file in (tmp_path / "index").iterdir()] == [
        shard.index.removeprefix("index/") for shard in second.split("train").shards
    ]
    assert path.exists(), "tars are never touched"


def test_killed_before_the_manifest_the_old_set_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", labelled([0, 1]))
    first = index(tmp_path, path)
    before = contents(tmp_path, first)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write_tar(tmp_path / "b.tar", labelled([1, 0, 1]))
    monkeypatch.setattr("distcnn.data.index.save_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        index(tmp_path, tmp_path / "b.tar", overwrite=True)
    assert contents(tmp_path, load_manifest(tmp_path)) == before


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", labelled([0]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distcnn.data.index.write_atomically", full)
    with pytest.raises(UserError, match=r"cannot write to .*/set: No space left"):
        index(tmp_path / "set", path)
    assert not (tmp_path / "set" / "dataset.json").exists()


# ---- the command ----


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_tar(tmp_path / f"t-{number}.tar", labelled([0, 1, 1]))
    write_tar(tmp_path / "v.tar", [("x.jpg", jpg())])
    (tmp_path / "classes.txt").write_text("crow\ntit\n")
    flags = ["--output", f"{tmp_path}/set/dataset.json", "--classes", f"{tmp_path}/classes.txt", "--verify"]
    patterns = [f"{tmp_path}/t-{{0..1}}.tar::{tmp_path}/t-[2].tar", f"extra={tmp_path}/v.tar"]
    assert main(["index", *patterns, *flags, "--unlabelled", "extra"]) == 0
    out = capsys.readouterr().out
    assert "train          9 images in 3 shards, 2 classes" in out
    assert "extra          1 images in 1 shards, no labels" in out
    assert "distcnn inspect" in out
    manifest = load_manifest(tmp_path / "set")
    assert manifest.classes == ("crow", "tit")
    assert manifest.split("train").class_counts == (3, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the shards"),
        (["pipe:cat x.tar"], "is a command"),
        (["train=pipe:cat x.tar"], "is a command"),
        (["/no/such.tar"], "is missing"),
        (["/no/such.tar", "--label", ""], "--label takes"),
        (["/no/such.tar", "--split", "a/b"], "--split 'a/b'"),
        (["/no/such.tar", "--classes", "/no/such.txt"], "cannot read the class names"),
        (["/no/such.tar", "val=/no/such.tar"], "named twice"),
        (["/no/such.tar", "--unlabelled", "test"], "no such split"),
        (["/no/such.tar", "--verfy"], "--verify"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["index", *words, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_output_is_a_folder_or_its_dataset_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "/no/such.tar", "--output", f"{tmp_path}/other.json"]) == 2
    assert "the file is called dataset.json" in capsys.readouterr().err


def test_sizes_come_from_the_pixels_not_from_the_name(tmp_path: Path) -> None:
    """A PNG named .jpg, and CMYK, are images like others."""
    from PIL import Image

    members = [
        ("a.jpg", encode(picture(0, 5, 7))),
        ("b.jpg", encode(Image.new("CMYK", (3, 2)), "JPEG")),
        ("c.png", encode(np.full((4, 4), 60_000, np.uint16))),
    ]
    manifest = index(tmp_path, write_tar(tmp_path / "a.tar", members), rule=LabelRule("none"), verify=True)
    rows = SplitReader(tmp_path, manifest.split("train")).index(0)
    assert list(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)) == [(7, 5), (3, 2), (4, 4)]
    assert decode(contents(tmp_path, manifest)[2][2])[0, 0].tolist() == [60_000 >> 8] * 3
