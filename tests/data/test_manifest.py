from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcnn.data.manifest import ImageStats, Manifest, Quarantined, Shard, Split, load_manifest, save_manifest
from distcnn.errors import DataError

TRAIN = Split(
    (Shard("train-0.tar", "index/0.npy", 3, 4096, "ab" * 32), Shard("s3://b/1.tar", "index/1.npy", 1, 9)), (1, 3)
)
EXAMPLE = Manifest(
    name="birds",
    classes=("crow", "tit"),
    splits={"train": TRAIN, "test": Split((Shard("/abs/t.tar", "index/t.npy", 2, 1024),))},
    image=ImageStats(32, 32, 24, 24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    quarantined=(Quarantined("x/y.jpg", "0 bytes", "train"),),
    source={"kind": "index", "seed": 3},
)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save_manifest(EXAMPLE, tmp_path)
    assert load_manifest(tmp_path) == load_manifest(path) == EXAMPLE
    assert [entry.name for entry in tmp_path.iterdir()] == ["dataset.json"]


@given(st.lists(st.text(st.characters(), max_size=20), unique=True, max_size=6), st.text(st.characters(), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_names_come_back(tmp_path_factory: pytest.TempPathFactory, classes: list[str], name: str) -> None:
    """Lone surrogates too: they are how names that are no UTF-8 are held."""
    folder = tmp_path_factory.mktemp("m")
    manifest = Manifest(name, tuple(classes), {}, quarantined=(Quarantined(name + "\udcff", "why"),))
    save_manifest(manifest, folder)
    assert load_manifest(folder) == manifest


def test_facts() -> None:
    assert (TRAIN.samples, TRAIN.labelled, EXAMPLE.splits["test"].labelled) == (4, True, False)
    assert EXAMPLE.image.uniform == (24, 32)
    assert ImageStats().uniform is None
    assert ImageStats(1, 2, 3, 3).uniform is None
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        EXAMPLE.split("trian")


def test_the_fingerprint_is_of_what_fixes_the_samples() -> None:
    same = [replace(EXAMPLE, name="other"), replace(EXAMPLE, quarantined=()), replace(EXAMPLE, source={})]
    assert {manifest.fingerprint() for manifest in same} == {EXAMPLE.fingerprint()}
    shard, other = TRAIN.shards
    moved = replace(TRAIN, shards=(replace(shard, name="/elsewhere.tar"), other))
    assert replace(EXAMPLE, splits=EXAMPLE.splits | {"train": moved}).fingerprint() == EXAMPLE.fingerprint()
    different = [
        replace(EXAMPLE, classes=("tit", "crow")),
        replace(EXAMPLE, splits={"train": TRAIN}),
        *(
            replace(EXAMPLE, splits=EXAMPLE.splits | {"train": split})
            for split in [
                replace(TRAIN, shards=TRAIN.shards[::-1]),
                replace(TRAIN, class_counts=(3, 1)),
                replace(TRAIN, shards=(replace(shard, bytes=5), other)),
                replace(TRAIN, shards=(replace(shard, sha256=""), other)),
                replace(TRAIN, shards=(replace(shard, samples=1), replace(other, samples=3))),
            ]
        ),
    ]
    assert len({manifest.fingerprint() for manifest in [EXAMPLE, *different]}) == len(different) + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shard("x", "y", -1, 0),
        lambda: Shard("x", "y", 1, -1),
        lambda: replace(EXAMPLE, classes=("crow",)),
        lambda: replace(EXAMPLE, classes=("crow", "crow")),
        lambda: replace(EXAMPLE, splits={"train": replace(TRAIN, class_counts=(2, 3))}),
        lambda: replace(EXAMPLE, splits={"train": replace(TRAIN, class_counts=(4,))}),
    ],
)
def test_impossible_ones_cannot_be_made(make: Any) -> None:
    with pytest.raises(ValueError, match=r"-1|two classes|counts"):
        make()


def edited(change: Any) -> str:
    document = json.loads(json.dumps(document_of(EXAMPLE)))
    change(document)
    return json.dumps(document)


def document_of(manifest: Manifest) -> Any:
    from dataclasses import asdict

    return asdict(manifest) | {"fingerprint": manifest.fingerprint()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("null", "damaged"),
        ("3", "damaged"),
        ("{}", "damaged"),
        ("[" * 200_000, "damaged"),
        ("\udcff", "damaged"),
        (edited(lambda d: d.pop("splits")), "damaged"),
        (edited(lambda d: d.update(splits=[])), "damaged"),
        (edited(lambda d: d.update(classes=None)), "damaged"),
        (edited(lambda d: d.update(image=None)), "damaged"),
        (edited(lambda d: d["splits"]["train"]["shards"][0].update(samples="3")), "damaged"),
        (edited(lambda d: d["splits"]["train"]["shards"][0].update(color="red")), "damaged"),
        (edited(lambda d: d["splits"]["train"]["shards"][0].pop("name")), "damaged"),
        (edited(lambda d: d["splits"]["train"].update(class_counts=[4, 1])), "damaged"),
        (edited(lambda d: d.update(version=2)), "version 2, this program reads 1"),
        (edited(lambda d: d.update(classes=["a", "b"])), "edited by hand"),
        (edited(lambda d: d.pop("fingerprint")), "edited by hand"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as raised:
        load_manifest(tmp_path)
    assert str(tmp_path / "dataset.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_none_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "dataset.json", tmp_path / "no"):
        with pytest.raises(DataError, match="distcnn prepare"):
            load_manifest(path)


def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_manifest(EXAMPLE, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_manifest(replace(EXAMPLE, name="new"), tmp_path)
    assert load_manifest(tmp_path) == EXAMPLE
    assert [entry.name for entry in tmp_path.iterdir()] == ["dataset.json"]
