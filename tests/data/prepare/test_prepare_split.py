from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_files import class_folders, contents, jpg, made, write

from distcnn.data.prepare.duplicates import content_groups, merge_groups
from distcnn.data.prepare.folders import from_folder
from distcnn.data.prepare.pool import Pool
from distcnn.data.prepare.split import Candidates, Fractions, stratified
from distcnn.errors import DataError, UserError


def candidates(labels: list[int], units: list[int] | None = None, grouped: bool = False) -> Candidates:
    array = np.array(labels, dtype=np.int64)
    whole = np.arange(len(labels)) if units is None else np.array(units, dtype=np.int64)
    return Candidates(array, whole, tuple("abcdefghij"), lambda i: f"image {i}", grouped)


@pytest.mark.parametrize(
    ("counts", "fractions", "expected"),
    [
        ([50, 50], Fractions(0.1, 0), {"train": [45, 45], "val": [5, 5]}),
        ([90, 10], Fractions(0.2, 0), {"train": [72, 8], "val": [18, 2]}),
        ([100, 100], Fractions(0.1, 0.2), {"train": [70, 70], "val": [10, 10], "test": [40 // 2, 20]}),
        ([2, 2], Fractions(0.5, 0), {"train": [1, 1], "val": [1, 1]}),
        ([10, 10], Fractions(0, 0), {"train": [10, 10]}),
        ([20, 20], Fractions(0, 0.25), {"train": [15, 15], "test": [5, 5]}),
    ],
)
def test_classes_keep_their_proportions(
    counts: list[int], fractions: Fractions, expected: dict[str, list[int]]
) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    splits = stratified(candidates(labels), fractions, seed=0)
    assert {name: np.bincount(np.array(labels)[ids]).tolist() for name, ids in splits.items()} == expected
    assert list(splits) == [name for name in ("train", "val", "test") if name in expected]
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(len(labels)))


def test_the_split_is_the_seeds() -> None:
    labels = [0, 1] * 50
    one = stratified(candidates(labels), Fractions(0.1), seed=1)["val"]
    assert np.array_equal(one, stratified(candidates(labels), Fractions(0.1), seed=1)["val"])
    assert not np.array_equal(one, stratified(candidates(labels), Fractions(0.1), seed=2)["val"])


@pytest.mark.parametrize(
    ("labels", "units", "message"),
    [
        ([0] * 20 + [1], None, r"class 'b' has 1 image \(image 20\).*--val-fraction 0"),
        ([0] * 20 + [1] * 3, [*range(20), 20, 20, 20], r"class 'b' has 3 images, all of .* same bytes \(image 20\)"),
        ([0, 1, 2, 3] * 3, None, "val would have 1 of 12 images, fewer than the 4 classes: use --val-fraction 0.34"),
    ],
)
def test_a_class_too_small_to_split_is_named(labels: list[int], units: list[int] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        stratified(candidates(labels, units), Fractions(0.1), seed=0)


@pytest.mark.parametrize("fractions", [(-0.1, 0), (1.0, 0), (0.5, 0.5), (0, -0.2), (float("nan"), 0)])
def test_fractions_that_leave_no_train_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="--val-fraction"):
        Fractions(*fractions)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(20, 200), st.booleans())
def test_units_stay_whole_and_every_image_is_in_one_split(seed: int, n: int, grouped: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n).tolist()
    units = rng.integers(0, max(n // 3, 8), n).tolist() if grouped else [int(i * rng.random()) for i in range(n)]
    if not grouped:  # duplicates have one label
        labels = [labels[unit] for unit in units]
    try:
        splits = stratified(candidates(labels, units, grouped), Fractions(0.2, 0.2), seed % 1000)
    except DataError:
        return  # too few units of a class: named elsewhere
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(n))
    of_unit: dict[int, set[str]] = {}
    for name, ids in splits.items():
        for i in ids.tolist():
            of_unit.setdefault(units[i], set()).add(name)
    assert all(len(names) == 1 for names in of_unit.values())


def test_groups_come_near_to_the_fraction_and_to_the_proportions() -> None:
    rng = np.random.default_rng(0)
    units = rng.integers(0, 60, 1200)
    labels = (units % 3 == 0) ^ (rng.random(1200) < 0.1)
    splits = stratified(candidates(labels.astype(int).tolist(), units.tolist(), True), Fractions(0.15), seed=0)
    assert abs(len(splits["val"]) / 1200 - 0.15) < 0.03
    assert abs(labels[splits["val"]].mean() - labels.mean()) < 0.1


def test_a_class_within_one_group_is_named() -> None:
    with pytest.raises(DataError, match=r"class 'b' has 5 images, all of one group"):
        stratified(candidates([0] * 20 + [1] * 5, [*range(20)] + [3] * 5, True), Fractions(0.2), seed=0)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ([0, 1, 2], [5, 5, 6], [{0, 1}, {2}]),
        ([0, 0, 1, 1], [7, 8, 8, 9], [{0, 1, 2, 3}]),
        ([3, 1, 2, 0], [0, 1, 2, 3], [{0}, {1}, {2}, {3}]),
        ([0, 1, 0, 2, 3], [9, 8, 7, 8, 7], [{0, 2, 4}, {1, 3}]),
        ([], [], []),
    ],
)
def test_groups_merge_where_they_overlap(first: list[int], second: list[int], together: list[set[int]]) -> None:
    groups = merge_groups(np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)).tolist()
    found = [{i for i, group in enumerate(groups) if group == value} for value in dict.fromkeys(groups)]
    assert found == together


def test_duplicates_are_found_by_content(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3, "b": 3})
    write(tmp_path / "a" / "x.jpg", jpg(1))  # = a/001.jpg
    write(tmp_path / "b" / "y.jpg", jpg(1))
    write(tmp_path / "b" / "e1.jpg", b"")
    write(tmp_path / "b" / "e2.jpg", b"")
    source = from_folder(tmp_path)
    seen: list[tuple[str, int, int]] = []
    groups = content_groups(source, np.arange(len(source)), Pool(1), lambda *at: seen.append(at))
    same = [{source.names[i] for i in np.flatnonzero(groups == group)} for group in set(groups.tolist())]
    assert [names for names in same if len(names) > 1] == [{"a/001.jpg", "a/x.jpg", "b/y.jpg"}]
    assert seen[-1][0] == "duplicates?"
    assert seen[-1][1] == seen[-1][2] < len(source)  # those of 0 bytes, or of a size of their own, were not read


def test_duplicates_never_lie_on_both_sides(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(20):
            for copy in range(2):
                write(tmp_path / "in" / label / f"{i}-{copy}.jpg", jpg(100 * ord(label) + i))
    made(from_folder(tmp_path / "in"), tmp_path / "out", val_fraction=0.3, test_fraction=0.2)
    splits = contents(tmp_path / "out")
    images = {name: {image for _, image in rows.values()} for name, rows in splits.items()}
    assert not images["train"] & images["val"]
    assert not images["train"] & images["test"]
    assert not images["val"] & images["test"]
    assert Counter({name: len(rows) for name, rows in splits.items()}) == {"train": 40, "val": 24, "test": 16}


def test_splits_that_share_images_are_kept_but_told(tmp_path: Path) -> None:
    class_folders(tmp_path / "in" / "train", {"a": 4, "b": 4})
    class_folders(tmp_path / "in" / "test", {"a": 2, "b": 2}, seed=500)
    write(tmp_path / "in" / "test" / "b" / "same.jpg", jpg(1))
    outcome = made(from_folder(tmp_path / "in"), tmp_path / "out")
    assert outcome.warnings == (
        "1 images of test have the same bytes as images of train (test/b/same.jpg = train/a/001.jpg ...)",
    )
    assert {name: split.samples for name, split in outcome.manifest.splits.items()} == {"train": 8, "test": 5}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"train": 20, "test": 10}),
        ({"val_fraction": 0.2}, {"train": 16, "val": 4, "test": 10}),
        ({"val_fraction": 0.0}, {"train": 20, "test": 10}),
    ],
)
def test_val_is_taken_from_a_given_train_only_if_asked(
    tmp_path: Path, flags: dict[str, float], expected: dict[str, int]
) -> None:
    class_folders(tmp_path / "in" / "train", {"a": 10, "b": 10})
    class_folders(tmp_path / "in" / "test", {"a": 5, "b": 5}, seed=500)
    outcome = made(from_folder(tmp_path / "in"), tmp_path / "out", **flags)
    assert {name: split.samples for name, split in outcome.manifest.splits.items()} == expected


def test_a_fraction_for_a_split_that_is_given_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "in" / "train", {"a": 10, "b": 10})
    class_folders(tmp_path / "in" / "val", {"a": 5, "b": 5}, seed=500)
    with pytest.raises(UserError, match=r"--val-fraction 0.1: the source has a val split of its own"):
        made(from_folder(tmp_path / "in"), tmp_path / "out", val_fraction=0.1)
    assert not (tmp_path / "out").exists()
