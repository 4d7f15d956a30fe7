from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from prepare_files import contents, files_in, jpg, made, png, write

from distcnn.data.prepare.parquet import from_parquet
from distcnn.errors import DataError, UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def parquet(path: Path, images: list[Any], labels: list[Any], names: list[str] | None = None) -> Path:
    """As the hub writes it: a struct of bytes and path, class names in the metadata."""
    table = pa.table({"image": images, "label": labels})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return path


def structs(n: int, seed: int = 0, path: bool = True) -> list[dict[str, Any]]:
    return [{"bytes": jpg(seed + i), "path": f"p/{seed + i}.jpg" if path else None} for i in range(n)]


def test_a_hub_folder_keeps_its_splits_and_class_names(tmp_path: Path) -> None:
    names = ["cat", "dog"]
    parquet(tmp_path / "in" / "data" / "train-00000-of-00002.parquet", structs(10), [0, 1] * 5, names)
    parquet(tmp_path / "in" / "data" / "train-00001-of-00002.parquet", structs(10, 10), [0, 1] * 5, names)
    parquet(tmp_path / "in" / "data" / "validation-00000-of-00001.parquet", structs(4, 40), [1, 1, 0, 1], names)
    manifest = made(from_parquet(tmp_path / "in"), tmp_path / "out").manifest
    assert manifest.classes == ("cat", "dog")
    splits = contents(tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 20, "val": 4}
    assert splits["val"] == {f"p/{40 + i}": (label, jpg(40 + i)) for i, label in enumerate([1, 1, 0, 1])}
    assert not [name for name in files_in(tmp_path / "out") if "images.bin" in name]


@pytest.mark.parametrize("kind", ["struct without path", "binary", "large_binary"])
def test_images_are_bytes_or_structs(tmp_path: Path, kind: str) -> None:
    data = [png(i) for i in range(20)]
    images: Any = {
        "struct without path": structs(20, path=False),
        "binary": data,
        "large_binary": pa.array(data, pa.large_binary()),
    }[kind]
    file = parquet(tmp_path / "flowers.parquet", images, ["x", "y"] * 10)
    manifest = made(from_parquet(file), tmp_path / "out").manifest
    assert manifest.name == "flowers"
    assert manifest.classes == ("x", "y")
    rows = contents(tmp_path / "out")["train"]
    expected = [jpg(i) for i in range(20)] if "struct" in kind else data
    assert all(row == (int(key) % 2, expected[int(key)]) for key, row in rows.items())


def test_duplicates_and_missing_images_in_parquet(tmp_path: Path) -> None:
    images = [*structs(20), {"bytes": jpg(3), "path": "copy.jpg"}, {"bytes": None, "path": "gone.jpg"}]
    file = parquet(tmp_path / "a.parquet", images, [0, 1] * 11)
    manifest = made(from_parquet(file), tmp_path / "out", val_fraction=0.5).manifest
    assert [(row.name, row.reason) for row in manifest.quarantined] == [("gone.jpg", "0 bytes")]
    splits = contents(tmp_path / "out")
    assert sum(("p/3" in rows) + ("copy" in rows) == 2 for rows in splits.values()) == 1


@pytest.mark.parametrize(
    ("images", "labels", "flags", "message"),
    [
        (structs(4), [0, 1, None, 1], {}, r"a.parquet row 2: label None"),
        (structs(4), [0.5, 1, 1, 1], {}, r"row 0: label 0.5"),
        (structs(4), [0, 0, 0, 0], {}, r"1 class"),
        (structs(4), [0, 1, 0, 1], {"image_column": "img"}, r"no column 'img'.*it has: image, label.*--image-column"),
        (structs(4), [0, 1, 0, 1], {"label_column": "y"}, r"no column 'y'.*--label-column"),
        ([1, 2, 3, 4], [0, 1, 0, 1], {}, r"column 'image' is int64"),
        ([{"path": "a"}] * 4, [0, 1, 0, 1], {}, r"column 'image' is struct<path: string>"),
    ],
)
def test_what_is_no_image_table_is_named(
    tmp_path: Path, images: list[Any], labels: list[Any], flags: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        from_parquet(parquet(tmp_path / "a.parquet", images, labels), **flags)


def test_labels_outside_of_the_named_classes_are_refused(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", structs(4), [0, 1, 2, 1], ["a", "b"])
    with pytest.raises(DataError, match="label '2' is none of the 2 classes"):
        from_parquet(file)


def test_files_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*a.parquet"):
        from_parquet(write(tmp_path / "a.parquet", "text"))
    for path in (tmp_path / "gone.parquet", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=r"is no .parquet file and holds none"):
            from_parquet(path)


def test_a_damaged_column_stops_with_the_file_named_and_nothing_left(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", structs(40), [0, 1] * 20)
    source = from_parquet(file)
    data = bytearray(file.read_bytes())
    data[100:3000] = bytes(2900)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read .*a.parquet"):
        made(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "a.parquet", structs(4), [0, 1, 0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'distcnn\[parquet\]'"):
        from_parquet(file)
