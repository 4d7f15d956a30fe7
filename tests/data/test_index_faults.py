from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import as_json, contents, index
from shard_files import encode, hostile_pickle, jpg, labelled, picture, write_tar

from distcnn.data.index import IndexRequest, index_data_set
from distcnn.data.labels import LabelRule, parse_rule
from distcnn.data.shards import SplitReader
from distcnn.errors import DataError
from distcnn.files import sha256_of

# ---- labels and keys that are wrong: an error that names shard and key ----


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([("k.jpg", b"1")], {}, r"has no \.cls"),
        ([("k.jpg", b"1"), ("k.cls", b"")], {}, "the label '', not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"cat")], {}, "the label 'cat', not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"1.0")], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"1_0")], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", "\u0661".encode())], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"\x80\x04\xff")], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"9" * 5000)], {}, "not an integer"),
        ([("k.jpg", b"1"), ("k.cls", b"1" * (2 << 20))], {}, "over 1048576 bytes"),
        ([("k.jpg", b"1"), ("k.cls", b"-1")], {}, "the label -1, out of the range"),
        ([("k.jpg", b"1"), ("k.cls", b"2")], {"classes": ("a", "b")}, "the label 2, out of the range 0 to 1"),
        ([("k.jpg", b"1"), ("k.cls", b"1000000")], {}, "out of the range"),
        ([("k.jpg", b"1"), ("k.json", b"1")], {"rule": LabelRule("json", "label")}, "has no 'label' in its .json"),
        ([("k.jpg", b"1"), ("k.json", b"{")], {"rule": LabelRule("json", "label")}, "cannot be read"),
        ([("k.jpg", b"1"), ("k.json", b"[" * 99999)], {"rule": LabelRule("json", "label")}, "cannot be read"),
        (
            [("k.jpg", b"1"), ("k.json", b'{"a": 1, "b": 2}')],
            {"rule": LabelRule("json", "label")},
            "no 'label' in its .json; it has a, b",
        ),
        ([("k.jpg", b"1"), ("k.json", b'{"a": true}')], {"rule": LabelRule("json", "a")}, "the label True: neither"),
        ([("k.jpg", b"1"), ("k.json", b'{"a": 1.5}')], {"rule": LabelRule("json", "a")}, "neither"),
        ([("k.jpg", b"1"), ("k.json", b'{"a": ""}')], {"rule": LabelRule("json", "a")}, "neither"),
        (
            [("k.jpg", b"1"), ("k.json", b'{"a": "' + b"x" * 999 + b'\\n"}')],
            {"rule": LabelRule("json", "a.b")},
            "no 'a.b'",
        ),
        ([("k.jpg", b"1")], {"rule": LabelRule("folder")}, "has no folder"),
        (
            [("tit/k.jpg", b"1")],
            {"rule": LabelRule("folder"), "classes": ("tits", "crow")},
            "the class 'tit'; did you mean 'tits'",
        ),
        ([("k.jpg", b"1"), ("l.jpg", b"1"), ("k.cls", b"1")], {"rule": LabelRule("none")}, "not neighbours"),
        ([("k.jpg", b"1"), ("k.jpg", b"1")], {"rule": LabelRule("none")}, "comes twice"),
        (
            [("j.jpg", b"1"), ("j.json", b'{"a": 1}'), ("k.jpg", b"1"), ("k.json", b'{"a": "x"}')],
            {"rule": LabelRule("json", "a")},
            "numbers and names mixed",
        ),
    ],
)
def test_labels_and_keys_that_are_wrong(
    tmp_path: Path, members: list[tuple[str, bytes]], options: dict[str, Any], message: str
) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as raised:
        index(tmp_path / "set", path, **options)
    text = str(raised.value)
    assert "a.tar" in text
    assert "'k'" in text or "'tit/k'" in text
    assert "\n" not in text
    assert not (tmp_path / "set").exists(), "nothing is written before everything was read"


def test_names_in_one_shard_and_numbers_in_another(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", as_json({"a": 1}))
    two = write_tar(tmp_path / "b.tar", as_json({"a": "x"}))
    with pytest.raises(DataError, match=r"names in shard .*b\.tar and numbers in shard .*a\.tar"):
        index(tmp_path / "set", one, two, rule=LabelRule("json", "a"))


# ---- shards that are wrong ----


def broken_shards(folder: Path) -> dict[str, str]:
    """Bad shards by name, and what must be said of each."""
    whole = write_tar(folder / "whole.tar", labelled(range(4))).read_bytes()
    files = {
        "cut": whole[:3000],
        "empty": b"",
        "text": b"not a tar at all" * 100,
        "gz": gzip.compress(whole),
        "link": None,
        "evil": None,
    }
    with tarfile.open(folder / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    write_tar(folder / "evil.tar", [("../../a.jpg", b"1")])
    for name, data in files.items():
        if data is not None:
            (folder / f"{name}.tar").write_bytes(data)
    return {
        "missing": "is missing",
        "cut": "is truncated",
        "empty": r"is empty \(0 bytes\)",
        "text": "is not a tar file",
        "gz": "gzip-compressed.*run 'gunzip'",
        "link": "symbolic link.*refused",
        "evil": "points outside of the archive: refused",
    }


def test_bad_shards_are_named_or_quarantined(tmp_path: Path) -> None:
    messages = broken_shards(tmp_path)
    good = tmp_path / "whole.tar"
    for name, message in messages.items():
        bad = tmp_path / f"{name}.tar"
        with pytest.raises(DataError, match=message) as raised:
            index(tmp_path / "set", good, bad)
        assert str(bad) in str(raised.value)
        assert not (tmp_path / "set").exists()
    bad = [tmp_path / f"{name}.tar" for name in messages]
    with pytest.raises(DataError, match=r"and 6 more shards; --skip-bad-shards"):
        index(tmp_path / "set", *bad, good)
    manifest = index(tmp_path / "set", *bad, good, skip_bad_shards=True)
    assert manifest.split("train").samples == 4
    assert {row.name: row.split for row in manifest.quarantined} == {str(path): "train" for path in bad}
    with pytest.raises(DataError, match=r"'train' has no usable sample in its 7 shards \(first: .*missing"):
        index(tmp_path / "set2", *bad, skip_bad_shards=True)


def test_images_that_headers_show_to_be_bad(tmp_path: Path) -> None:
    members = [("a.cls", b"0"), ("a.jpg", b""), ("b.cls", b"0"), ("c.json", b"{}"), ("c.cls", b"x"), *labelled([0])]
    manifest = index(tmp_path, write_tar(tmp_path / "a.tar", members))
    assert [(row.name, row.reason) for row in manifest.quarantined] == [
        ("a.tar/a.jpg", "0 bytes"),
        ("a.tar/b", "no image beside its .cls"),
        ("a.tar/c", "no image beside its .json, .cls"),
    ]
    assert manifest.split("train").samples == 1


# ---- verification ----


def test_verify_quarantines_what_does_not_decode(tmp_path: Path) -> None:
    good = [picture(seed, 10 + seed, 20) for seed in range(3)]
    members = []
    for number, image in enumerate(good):
        members += [(f"{number}.cls", b"0"), (f"{number}.png", encode(image))]
    bad = {
        "text.jpg": b"this is text",
        "cut.jpg": jpg(0, 64, 64)[:-300],
        "zero.png": b"",
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "pickle.jpg": b"\x80\x04K\x01.",
    }
    for name, data in bad.items():
        members += [(name, data), (name.split(".")[0] + ".cls", b"0")]
    path = write_tar(tmp_path / "a.tar", members)
    plain = index(tmp_path, path)
    assert plain.image.mean == ()
    assert plain.split("train").shards[0].sha256 == ""
    manifest = index(tmp_path, path, verify=True, overwrite=True)
    assert [row.name.rpartition("/")[2].split(".")[0] for row in manifest.quarantined] == [
        "zero",
        "text",
        "cut",
        "eps",
        "pickle",
    ]
    assert [key for key, _, _ in contents(tmp_path, manifest)] == ["0", "1", "2"]
    rows = SplitReader(tmp_path, manifest.split("train")).index(0)
    assert list(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)) == [(20, 10), (20, 11), (20, 12)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in good]) / 255
    assert np.allclose(manifest.image.mean, pixels.mean(axis=0), atol=1e-6)
    assert np.allclose(manifest.image.std, pixels.std(axis=0), atol=1e-6)
    assert (manifest.image.min_height, manifest.image.max_height, manifest.image.uniform) == (10, 12, None)
    assert manifest.split("train").shards[0].sha256 == sha256_of(path)
    assert manifest.split("train").class_counts == (3,)


def test_verify_in_processes_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.index.BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr("distcnn.data.sweep.CHUNK_IMAGES", 4)
    members = labelled(range(11))
    members[7] = ("0003.jpg", b"bad")
    paths = [str(write_tar(tmp_path / f"{n}.tar", members)) for n in range(2)]
    one = index_data_set(IndexRequest(tmp_path / "one", {"train": paths}, verify=True, workers=1, name="x"))
    two = index_data_set(IndexRequest(tmp_path / "two", {"train": paths}, verify=True, workers=2, name="x"))
    assert one == two
    assert [row.name for row in one.quarantined] == [f"{path}/0003" for path in paths]


# ---- nothing of a shard is run ----


def test_pickles_in_a_shard_are_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = hostile_pickle(trace)
    buffer = io.BytesIO()
    np.save(buffer, np.array([0]))
    members = []
    for extension in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "msg", "cbor", "mp", "x.pyd"):
        members.append((f"a.{extension}", payload))
    members += [("a.cls", b"0"), ("a.jpg", jpg()), ("b.jpg", payload), ("b.cls", b"0"), ("b.pkl", payload)]
    path = write_tar(tmp_path / "a.tar", members)
    manifest = index(tmp_path, path, verify=True)
    assert [row.name for row in manifest.quarantined] == ["a.tar/b"]
    assert not trace.exists()
    for extension, rule in (("cls", "cls"), ("json", "label")):
        path = write_tar(tmp_path / "b.tar", [("a.jpg", jpg()), (f"a.{extension}", payload)])
        with pytest.raises(DataError, match="'a'"):
            index(tmp_path / "no", path, rule=parse_rule(rule))
    assert not trace.exists()
