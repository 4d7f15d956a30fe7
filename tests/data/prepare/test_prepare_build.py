from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prepare_files import by_webdataset, bytes_of, class_folders, contents, files_in, jpg, made, members, write

from distcnn.data.manifest import MANIFEST_NAME, load_manifest, save_manifest
from distcnn.data.order import permutation
from distcnn.data.prepare import prepare_digits
from distcnn.data.prepare.build import SHUFFLE, Settings, build, cut_by_size
from distcnn.data.prepare.folders import from_folder
from distcnn.data.prepare.images import Policy
from distcnn.data.prepare.writer import Limits
from distcnn.data.shards import SplitReader
from distcnn.errors import DataError, UserError
from distcnn.files import sha256_of


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "in", {"ant": 30, "bee": 20, "cat": 10})


def test_a_folder_becomes_a_set_that_webdataset_reads(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    manifest = made(from_folder(folders), out, limits=Limits(samples=17)).manifest
    assert manifest == load_manifest(out)
    assert manifest.classes == ("ant", "bee", "cat")
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": (27, 18, 9),
        "val": (3, 2, 1),
    }
    assert [shard.samples for shard in manifest.splits["train"].shards] == [17, 17, 17, 3]
    assert files_in(out) == sorted(
        [MANIFEST_NAME, "val-000000.npy", "val-000000.tar"]
        + [f"train-{i:06d}.{kind}" for i in range(4) for kind in ("npy", "tar")]
    )
    assert (manifest.image.min_width, manifest.image.max_height) == (12, 8)
    by_index = contents(out)
    seen = set()
    for name, split in manifest.splits.items():
        for shard in split.shards:
            assert sha256_of(out / shard.name) == shard.sha256
        samples = by_webdataset([out / shard.name for shard in split.shards])
        assert {s["__key__"]: (int(s["cls"]), s["jpg"]) for s in samples} == by_index[name]
        assert [s["__key__"] for s in samples] == list(by_index[name])
        for sample in samples:
            name_in_source = f"{sample['__key__']}.jpg"
            assert (folders / name_in_source).read_bytes() == sample["jpg"]
            assert manifest.classes[int(sample["cls"])] == name_in_source.split("/")[0]
            seen.add(name_in_source)
            assert "json" not in sample  # it would say nothing more
    assert len(seen) == 60


def test_where_a_key_is_not_the_name_all_samples_tell_theirs(folders: Path, tmp_path: Path) -> None:
    (folders / "ant" / "000.jpg").rename(folders / "ant" / "a b.JPEG")
    manifest = made(from_folder(folders), tmp_path / "out").manifest
    shards = [tmp_path / "out" / shard.name for split in manifest.splits.values() for shard in split.shards]
    names = {json.loads(sample["json"])["name"] for sample in by_webdataset(shards)}
    assert names == {path.relative_to(folders).as_posix() for path in folders.rglob("*.*")} and len(names) == 60


def test_samples_are_shuffled_by_the_seed_before_they_are_cut(folders: Path, tmp_path: Path) -> None:
    source = from_folder(folders)
    made(source, tmp_path / "out", val_fraction=0.0, seed=7)
    order = permutation(60, 7, SHUFFLE, 0)
    assert list(contents(tmp_path / "out")["train"]) == [source.names[i].removesuffix(".jpg") for i in order]
    # pinned: what comes out for a seed must never change
    assert order[:8].tolist() == [4, 28, 11, 6, 52, 2, 33, 24]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bytes_from_any_number_of_workers(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distcnn.data.prepare.build.ALONE_SECONDS", 0.0)
    monkeypatch.setattr("distcnn.data.prepare.build.TASK_SAMPLES", 13)
    source = from_folder(class_folders(tmp_path / "in", {"a": 100, "b": 61}))
    write(tmp_path / "in" / "a" / "bad.jpg", b"no image")
    made(source, tmp_path / "one", limits=Limits(samples=40))
    made(source, tmp_path / "many", limits=Limits(samples=40), workers=workers)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "many")


def test_another_seed_is_another_set(folders: Path, tmp_path: Path) -> None:
    one, two = (made(from_folder(folders), tmp_path / str(seed), seed=seed).manifest for seed in (1, 2))
    assert one.fingerprint() != two.fingerprint()


def test_digits_are_made_once(tmp_path: Path) -> None:
    manifest = prepare_digits(tmp_path / "digits")
    before = {name: (tmp_path / "digits" / name).stat().st_mtime_ns for name in files_in(tmp_path / "digits")}
    assert prepare_digits(tmp_path / "digits") == manifest
    assert {name: (tmp_path / "digits" / name).stat().st_mtime_ns for name in before} == before
    assert (manifest.splits["train"].samples, manifest.splits["val"].samples) == (1438, 359)
    assert manifest.image.grayscale
    assert manifest.image.uniform == (8, 8)
    assert manifest.image.mean == (0.3052, 0.3052, 0.3052)
    assert not any(name.endswith(".json") for name in members(tmp_path / "digits", manifest))
    # pinned: the default set of every first run
    assert manifest.splits["val"].class_counts == (36, 36, 35, 37, 36, 36, 36, 36, 35, 36)
    assert list(contents(tmp_path / "digits")["train"])[:3] == ["00001023", "00000899", "00000541"]


def test_a_set_that_is_there_is_left_alone_and_another_is_refused(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert made(from_folder(folders), out).made
    before = bytes_of(out)
    assert not made(from_folder(folders), out).made
    assert not made(from_folder(folders), out, max_bad=5.0, workers=2).made  # these do not decide what comes out
    for settings in ({"seed": 1}, {"val_fraction": 0.2}, {"policy": Policy(max_side=9)}, {"limits": Limits(samples=9)}):
        with pytest.raises(UserError, match=r"holds another data set .* --overwrite"):
            made(from_folder(folders), out, **settings)
    write(folders / "ant" / "new.jpg", jpg(5000))
    with pytest.raises(UserError, match="holds another data set"):
        made(from_folder(folders), out)
    assert bytes_of(out) == before


def test_overwrite_replaces_the_set_and_leaves_no_old_shards(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(from_folder(folders), out, limits=Limits(samples=5))
    write(out / "notes.txt", "mine")
    build(from_folder(folders), out, Settings(workers=1), overwrite=True)
    made(from_folder(folders), tmp_path / "fresh")
    assert bytes_of(out) == bytes_of(tmp_path / "fresh") | {"notes.txt": b"mine"}


def test_a_set_that_prepare_did_not_make_is_never_replaced(folders: Path, tmp_path: Path) -> None:
    """Such as one that 'distcnn index' made: its shards may be somebody's only copy."""
    out = tmp_path / "out"
    made(from_folder(folders), out)
    save_manifest(replace(load_manifest(out), source={"kind": "index"}), out)
    before = bytes_of(out)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds a data set that prepare did not make"):
            build(from_folder(folders), out, Settings(workers=1, seed=4), overwrite=overwrite)
    assert bytes_of(out) == before


def test_bad_images_are_left_out_by_name(folders: Path, tmp_path: Path) -> None:
    write(folders / "ant" / "000.jpg", b"")
    write(folders / "cat" / "text.jpg", "no image")
    manifest = made(from_folder(folders), tmp_path / "out").manifest
    assert [(row.name, row.reason.split(":")[0][:12]) for row in manifest.quarantined] == [
        ("ant/000.jpg", "0 bytes"),
        ("cat/text.jpg", "not an image"),
    ]
    assert sum(split.samples for split in manifest.splits.values()) == 59
    assert sum(sum(split.class_counts) for split in manifest.splits.values()) == 59


@pytest.mark.parametrize(
    ("bad", "limit", "stops"),
    [
        (10, 0.01, False),
        (11, 0.01, True),
        (30, 0.5, False),
        (36, 0.5, True),
        (1, 0.0, True),
        (2, 1.0, True),
        (2, 2.0, False),
    ],
)
def test_too_many_bad_images_stop_the_work(tmp_path: Path, bad: int, limit: float, stops: bool) -> None:
    folder = class_folders(tmp_path / "in", {"a": 30, "b": 40 - bad + 0})
    for i in range(bad):
        write(folder / "b" / f"bad{i}.jpg", b"bad %d" % i)
    if stops:
        with pytest.raises(DataError, match=r"more than \d+ of 70 images cannot be used .*bad\d+.jpg: .*--max-bad"):
            made(from_folder(folder), tmp_path / "out", max_bad=limit)
        assert not (tmp_path / "out").exists()
    else:
        assert len(made(from_folder(folder), tmp_path / "out", max_bad=limit).manifest.quarantined) == bad


def test_a_split_or_class_without_a_good_image_is_named(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "in" / "train", {"a": 5, "b": 5}).parent
    write(folder / "train" / "c" / "1.jpg", b"bad")
    outcome = made(from_folder(folder), tmp_path / "one")
    assert "class 'c' has no image in train" in outcome.warnings
    write(folder / "test" / "a" / "1.jpg", b"bad")
    with pytest.raises(DataError, match=r"no image of test can be used \(the first: test/a/1.jpg"):
        made(from_folder(folder), tmp_path / "two")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("settings", [{"seed": -1}, {"seed": 2**32}, {"max_bad": -1.0}, {"workers": -1}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="--"):
        Settings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "most", "most_bytes", "runs"),
    [
        ([1] * 7, 3, 100, [3, 3, 1]),
        ([60, 50, 10, 200, 1], 10, 100, [2, 2, 1]),
        ([500, 500], 10, 100, [1, 1]),
        ([0, 0, 0], 2, 100, [2, 1]),
        ([], 2, 100, []),
    ],
)
def test_tasks_are_bounded_by_count_and_bytes(sizes: list[int], most: int, most_bytes: int, runs: list[int]) -> None:
    ids = np.arange(len(sizes))[::-1]
    cut = list(cut_by_size(ids, np.array(sizes[::-1], dtype=np.int64), most, most_bytes))
    assert [len(run) for run in cut] == runs
    assert np.concatenate([*cut, np.empty(0, dtype=np.int64)]).tolist() == ids.tolist()


def test_progress_is_reported_for_every_split(folders: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build(from_folder(folders), tmp_path / "out", Settings(workers=1), lambda *at: seen.append(at))
    assert [at for at in seen if at[1] == at[2]][-2:] == [("train", 54, 54), ("val", 6, 6)]


def test_readers_find_the_sizes_of_images(tmp_path: Path) -> None:
    for i, (width, height) in enumerate([(5, 9), (40, 3), (7, 7), (8, 8)]):
        write(tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg", jpg(i, width, height))
    manifest = made(from_folder(tmp_path / "in"), tmp_path / "out", val_fraction=0.0).manifest
    reader = SplitReader(tmp_path / "out", manifest.splits["train"])
    assert sorted(reader.index(0)[["width", "height"]].tolist()) == [(5, 9), (7, 7), (8, 8), (40, 3)]
    image = manifest.image
    assert (image.min_width, image.max_width, image.min_height, image.max_height) == (5, 40, 3, 9)
