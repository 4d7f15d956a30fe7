from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from prepare_files import class_folders, contents, jpg, made, png, write

from distcnn.data.prepare.folders import find_images, from_folder
from distcnn.data.prepare.pool import Pool
from distcnn.data.prepare.source import SPLITS, order_classes
from distcnn.errors import DataError


def test_the_class_is_the_first_folder_at_any_depth_and_in_any_case(tmp_path: Path) -> None:
    for name in ("cat/1.JPG", "cat/deep/er/2.jpeg", "dog/3.PnG", "dog/4.jfif", "Ant/5.jpg"):
        write(tmp_path / name, jpg())
    for name in (
        "cat/notes.txt",
        "cat/.hidden.jpg",
        ".git/x/1.jpg",
        "README",
        "dog/archive.tar",
        "dog/folder.jpg/in.png",
    ):
        write(tmp_path / name, jpg())
    source = from_folder(tmp_path)
    assert source.classes == ("Ant", "cat", "dog")
    rows = dict(zip(source.names, source.labels.tolist(), strict=True))
    assert rows == {
        "Ant/5.jpg": 0,
        "cat/1.JPG": 1,
        "cat/deep/er/2.jpeg": 1,
        "dog/3.PnG": 2,
        "dog/4.jfif": 2,
        "dog/folder.jpg/in.png": 2,
    }
    assert source.sizes.tolist() == [len(jpg())] * 6
    assert source.split_of.tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "test"), {"train", "test"}),
        (("train", "val", "test"), {"train", "val", "test"}),
        (("Train", "VALID"), {"train", "val"}),
        (("training", "validation", "testing"), {"train", "val", "test"}),
        (("train",), {"train"}),
    ],
)
def test_folders_of_splits_are_taken_as_given(tmp_path: Path, folders: tuple[str, ...], splits: set[str]) -> None:
    for folder in folders:
        class_folders(tmp_path / folder, {"a": 2, "b": 3}, seed=len(folder) * 100)
    source = from_folder(tmp_path)
    assert source.classes == ("a", "b")
    assert {SPLITS[at] for at in source.split_of.tolist()} == splits
    assert np.bincount(source.labels).tolist() == [2 * len(folders), 3 * len(folders)]


@pytest.mark.parametrize("folders", [("train", "bus"), ("test", "val"), ("train", "val", "extra")])
def test_folders_that_are_not_all_splits_are_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        class_folders(tmp_path / folder, {"x": 2})
    assert from_folder(tmp_path).classes == tuple(sorted(folders))


def test_a_class_that_a_split_lacks_is_told(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 2, "b": 2})
    class_folders(tmp_path / "test", {"a": 2, "c": 2}, seed=50)
    warnings = from_folder(tmp_path).warnings
    assert warnings == (
        "train has no image of 1 of the 3 classes: c",
        "test has no image of 1 of the 3 classes: b",
    )


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ({"10", "9", "1"}, ("1", "9", "10")),
        ({"b", "a10", "a9", "A"}, ("A", "a10", "a9", "b")),
        ({"1", "2", "x"}, ("1", "2", "x")),
        ({"01", "1", "002"}, ("01", "1", "002")),
        ({"٣", "1"}, ("1", "٣")),
    ],
)
def test_classes_are_sorted_by_value_where_all_are_integers(names: set[str], order: tuple[str, ...]) -> None:
    assert order_classes(names) == order


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds no image"),
        (("a/readme.txt",), "holds no image"),
        (("a/1.jpg", "a/2.jpg"), "1 class \\('a'\\)"),
        (("a/1.jpg", "b/1.jpg", "3.jpg"), "3.jpg lies in no class folder"),
        (("train/a/1.jpg", "train/2.jpg"), "train/2.jpg lies in no class folder"),
    ],
)
def test_what_is_no_set_of_classes_is_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        write(tmp_path / name, jpg())
    with pytest.raises(DataError, match=message):
        from_folder(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        from_folder(tmp_path / "nowhere")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    class_folders(tmp_path / "real", {"x": 2})
    class_folders(tmp_path / "set", {"a": 1})
    (tmp_path / "set" / "b").symlink_to(tmp_path / "real" / "x")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "gone.jpg").symlink_to(tmp_path / "nothing")
    assert find_images(tmp_path / "set").paths == ["a/000.jpg", "b/000.jpg", "b/001.jpg"]


def test_processes_list_what_one_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("val", "train"):
        class_folders(tmp_path / split, {"b": 3, "a": 4, "c d/e": 2, "c": 1})
    (tmp_path / "train" / "c" / "up").symlink_to(tmp_path / "train")
    alone = find_images(tmp_path)
    monkeypatch.setattr("distcnn.data.prepare.folders.MANY", 5)
    with Pool(2) as pool:
        together = find_images(tmp_path, pool)
    assert (
        together.paths
        == alone.paths
        == [
            f"{s}/{c}"
            for s in ("train", "val")
            for c in (
                *(f"a/{i:03}.jpg" for i in range(4)),
                *(f"b/{i:03}.jpg" for i in range(3)),
                "c/000.jpg",
                "c d/e/000.jpg",
                "c d/e/001.jpg",
            )
        ]
    )
    assert together.folders == alone.folders and sum(count for _, count in alone.folders) == 20
    assert np.array_equal(together.sizes, alone.sizes) and np.array_equal(together.times, alone.times)


def test_names_of_any_bytes_are_read_and_shown(tmp_path: Path) -> None:
    class_folders(tmp_path, {"ä ö": 2})
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102 - a name that is no Unicode
    for i in range(2):
        with open(folder + b"/%d \xff.jpg" % i, "wb") as file:  # noqa: PTH123
            file.write(jpg(100 + i))
    source = from_folder(tmp_path)
    assert source.classes == ("caf?", "ä ö")
    made(source, tmp_path / "out", val_fraction=0.0)
    images = contents(tmp_path / "out")["train"]
    assert {image for _, image in images.values()} == {jpg(0), jpg(1), jpg(100), jpg(101)}


def test_the_digest_tells_a_changed_file(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 2, "b": 2})
    before = from_folder(tmp_path).digest
    assert from_folder(tmp_path).digest == before
    write(tmp_path / "a" / "000.jpg", png())
    changed = from_folder(tmp_path).digest
    write(tmp_path / "a" / "002.jpg", png())
    assert len({before, changed, from_folder(tmp_path).digest}) == 3
