from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prepare_files import by_webdataset, class_folders, contents, jpg, made, png, write

from distcnn.data.prepare.folders import from_folder
from distcnn.data.prepare.tables import Columns, from_csv, read_table
from distcnn.errors import DataError, UserError

IDS = ("cat1", "cat2", "dog1", "dog2")
ROWS = "id,label\n" + "".join(f"{name},{name[:3]}\n" for name in IDS)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, name in enumerate(IDS):
        write(tmp_path / "images" / f"{name}.jpg", jpg(seed))
    return tmp_path / "images"


def labels_of(table: Path, images: Path, **columns: str) -> dict[str, str]:
    source = from_csv(table, images, Columns(**columns))
    return {name: source.classes[label] for name, label in zip(source.names, source.labels.tolist(), strict=True)}


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        ROWS.replace("\n", "\r\n"),
        ROWS.replace(",", "\t"),
        ROWS.replace(",", ";"),
        ROWS.replace("cat1", '"cat1"').replace("dog2,", ' "dog2"').replace(' "dog2"', "dog2 , "),
        "\ufeff" + ROWS,
        "extra,label,id\n" + "".join(f'"a, b",{name[:3]},{name}\n' for name in IDS),
        ROWS + "\n\n",
        ROWS.rstrip("\n"),
    ],
)
def test_tables_of_many_forms_say_the_same(tmp_path: Path, images: Path, text: str) -> None:
    expected = {name: name[:3] for name in IDS}
    assert labels_of(write(tmp_path / "t.csv", text), images) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, images: Path, encoding: str) -> None:
    assert len(labels_of(write(tmp_path / "t.csv", ROWS.encode(encoding)), images)) == 4


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("cat1", "cat1.jpg"),
        ("cat1.jpg", "cat1.jpg"),
        ("a/cat1", "a/cat1.jpg"),
        ("cat1", "a/b/cat1.PNG"),
        ("cat1.png", "deep/cat1.png"),
        ("7", "7.jpg"),
        ("x.y", "x.y.jpg"),
        ("ü", "ü.jpg"),
    ],
)
def test_names_come_with_or_without_extension_and_folder(tmp_path: Path, written: str, stored: str) -> None:
    write(tmp_path / "images" / stored, jpg(1))
    write(tmp_path / "images" / "other.jpg", jpg(2))
    table = write(tmp_path / "t.csv", f"id,label\n{written},a\nother,b\n")
    source = from_csv(table, tmp_path / "images", Columns())
    assert (tmp_path / "images" / stored).read_bytes() == Path(str(source.payload(0))).read_bytes()
    assert source.names == [written, "other"]


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (["10", "9", "1", "9"], ("1", "9", "10"), [2, 1, 0, 1]),
        (["3.0", "1.0", "2.0", "3.0"], ("1", "2", "3"), [2, 0, 1, 2]),
        (["0.5", "1.0", "2", "0.5"], ("0.5", "1.0", "2"), [0, 1, 2, 0]),
        (["b", "B", "a", "b"], ("B", "a", "b"), [2, 0, 1, 2]),
        (["-1", "1", "-1", "1"], ("-1", "1"), [0, 1, 0, 1]),
    ],
)
def test_labels_are_text_or_numbers(
    tmp_path: Path, images: Path, values: list[str], classes: tuple[str, ...], labels: list[int]
) -> None:
    rows = "".join(f"{name},{value}\n" for name, value in zip(IDS, values, strict=True))
    source = from_csv(write(tmp_path / "t.csv", "id,label\n" + rows), images, Columns())
    assert source.classes == classes
    assert source.labels.tolist() == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t.csv has no rows"),
        ("id,label\n", r"t.csv has no rows"),
        ("name,label\ncat1,cat\n", r"no column 'id'.*it has: name, label.*--image-column"),
        ("id,lable\ncat1,cat\n", r"no column 'label'; did you mean 'lable'\?.*--label-column"),
        (ROWS + "dog3,dog\ndog4,dog\n", r"t.csv line 6: no image 'dog3' in .*images \(2 rows lack their image\)"),
        (ROWS + "cat1,cat\n", r"t.csv line 6 names 'cat1' again, after .*t.csv line 2"),
        (ROWS + "cat1.jpg,dog\n", r"t.csv line 6 names 'cat1.jpg' again, after .*t.csv line 2"),
        (ROWS.replace("cat2,cat", "cat2,"), r"t.csv line 3: no label in column 'label'"),
        (ROWS.replace("cat2,cat", "cat2"), r"t.csv line 3: 1 values for 2 columns"),
        (ROWS.replace("cat2,cat", "cat2,cat,4"), r"t.csv line 3: 3 values for 2 columns"),
        (ROWS.replace("dog", "cat").replace("cat1,", "dog1,"), r"no image|1 class|again"),
        ("id,label\ncat1,x\ndog1,x\n", r"column 'label': 1 class \(x\)"),
        (ROWS.replace("cat2", '"cat2'), r"t.csv line \d+: "),
        (ROWS.encode().replace(b"dog1", b"d\xe9g1"), r"t.csv line 4 is not utf-8 \(byte 0xe9\).*--encoding cp1252"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, images: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        from_csv(write(tmp_path / "t.csv", text), images, Columns())
    assert "\n" not in str(caught.value)


def test_a_class_of_one_image_is_named_with_its_line_and_nothing_is_written(tmp_path: Path, images: Path) -> None:
    for i in range(20):
        write(images / f"more{i}.jpg", jpg(50 + i))
    rows = "id,label\n" + "".join(f"more{i},{'ab'[i % 2]}\n" for i in range(20)) + "cat1,cat\n"
    source = from_csv(write(tmp_path / "t.csv", rows), images, Columns())
    with pytest.raises(DataError, match=r"class 'cat' has 1 image \(.*t.csv line 22, cat1\)"):
        made(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_images_of_one_name_must_be_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "i" / "a" / "1.jpg", jpg(1))
    write(tmp_path / "i" / "b" / "1.jpg", jpg(2))
    with pytest.raises(DataError, match=r"line 2: more than one image in .* is called '1'"):
        from_csv(write(tmp_path / "t.csv", "id,label\n1,x\nb/1,y\n"), tmp_path / "i", Columns())
    assert labels_of(write(tmp_path / "t.csv", "id,label\na/1,x\nb/1.jpg,y\n"), tmp_path / "i") == {
        "a/1": "x",
        "b/1.jpg": "y",
    }


def test_missing_files_and_unknown_encodings_are_named(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone.csv: No such file"):
        from_csv(tmp_path / "gone.csv", images, Columns())
    table = write(tmp_path / "t.csv", ROWS)
    with pytest.raises(UserError, match="--encoding klingon: no such encoding"):
        from_csv(table, images, Columns(), encoding="klingon")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        from_csv(table, tmp_path / "nowhere", Columns())


def test_another_encoding_can_be_named(tmp_path: Path, images: Path) -> None:
    table = write(tmp_path / "t.csv", ROWS.replace("dog\n", "d\u00f6g\n").encode("cp1252"))
    assert set(read_table(table, "cp1252").columns["label"]) == {"cat", "d\u00f6g"}


def test_groups_stay_in_one_split(tmp_path: Path) -> None:
    rows = "id,label,patient\n"
    for i in range(60):
        write(tmp_path / "i" / f"{i}.jpg", jpg(i))
        rows += f"{i},{'ab'[i % 2]},p{i // 6}\n"
    source = from_csv(write(tmp_path / "t.csv", rows), tmp_path / "i", Columns(group="patient"))
    made(source, tmp_path / "out", val_fraction=0.3)
    patients = {
        name: {
            int(json.loads(s["json"])["name"]) // 6 for s in by_webdataset([tmp_path / "out" / f"{name}-000000.tar"])
        }
        for name in ("train", "val")
    }
    assert not patients["train"] & patients["val"]
    assert patients["train"] | patients["val"] == set(range(10))
    assert len(patients["val"]) == 3
    with pytest.raises(DataError, match=r"line 2: no group"):
        from_csv(write(tmp_path / "t.csv", "id,label,patient\n1,a,\n2,b,p\n"), tmp_path / "i", Columns(group="patient"))


@pytest.mark.parametrize("own_folder", [False, True])
def test_a_table_without_labels_becomes_test(tmp_path: Path, images: Path, own_folder: bool) -> None:
    for i in range(18):
        write(images / f"cat{i + 3}.jpg", jpg(100 + i))
        write(images / f"dog{i + 3}.jpg", jpg(200 + i))
    rows = "id,label\n" + "".join(f"{kind}{i + 1},{kind}\n" for kind in ("cat", "dog") for i in range(20))
    folder = tmp_path / "test_images" if own_folder else images
    for i in range(3):
        write(folder / f"q{i}.png", png(300 + i))
    write(images / "unused.jpg", jpg(999))
    test_csv = write(tmp_path / "test.csv", "id,label\nq2,\nq0,ignored\nq1,cat\n")
    source = from_csv(write(tmp_path / "train.csv", rows), images, Columns(), test_csv, folder if own_folder else None)
    assert source.warnings == (f"1 images in {images} are in no row of the table and were left out",)
    manifest = made(source, tmp_path / "out").manifest
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 36, "val": 4, "test": 3}
    assert manifest.splits["test"].class_counts == ()
    assert not manifest.splits["test"].labelled
    assert manifest.splits["val"].class_counts == (2, 2)
    assert {key: row[0] for key, row in contents(tmp_path / "out")["test"].items()} == {"q0": -1, "q1": -1, "q2": -1}
    samples = by_webdataset([tmp_path / "out" / "test-000000.tar"])
    assert all("cls" not in sample for sample in samples)
    assert {json.loads(s["json"])["name"] for s in samples} == {"q0", "q1", "q2"}
    assert manifest.name == tmp_path.name  # train.csv says nothing about what it is


def test_the_same_images_from_folders_and_from_a_table_are_the_same_shards(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "in", {"a": 25, "b": 31, "c": 12})
    source = from_folder(folder)
    rows = "id,label\n" + "".join(f"{name},{name[0]}\n" for name in source.names)
    table = from_csv(write(tmp_path / "t.csv", rows), folder, Columns())
    made(source, tmp_path / "one", test_fraction=0.2)
    made(table, tmp_path / "two", test_fraction=0.2)
    for name in ("train", "val", "test"):
        for kind in ("tar", "npy"):
            file = f"{name}-000000.{kind}"
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_digest_tells_changed_labels(tmp_path: Path, images: Path) -> None:
    one = from_csv(write(tmp_path / "t.csv", ROWS), images, Columns())
    two = from_csv(write(tmp_path / "t.csv", ROWS.replace("cat1,cat", "cat1,dog")), images, Columns())
    assert one.digest != two.digest
    assert np.array_equal(one.sizes, two.sizes)
