from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_files import contents, made, write

from distcnn.data.decode import decode
from distcnn.data.prepare import idx
from distcnn.data.prepare.arrays import from_digits, from_npz
from distcnn.data.prepare.idx import from_idx, read_idx
from distcnn.data.prepare.source import Source
from distcnn.errors import DataError


def gray(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 5), dtype=np.uint8)


def rgb(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)


def labels(n: int, k: int = 2) -> np.ndarray:
    return np.arange(n) % k


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pixels(source: Source) -> np.ndarray:
    return np.stack([np.asarray(source.payload(i)) for i in range(len(source))])


def test_digits_are_scikit_learns_scaled_to_255() -> None:
    source = from_digits()
    stored = pixels(source)
    assert stored.shape == (1797, 8, 8)
    assert (stored.min(), stored.max()) == (0, 255)
    assert stored[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    assert source.classes == tuple("0123456789")
    assert source.labels[:10].tolist() == list(range(10))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (gray(4), gray(4)),
        (gray(4)[..., None], gray(4)),
        (rgb(4), rgb(4)),
        (rgb(4).transpose(0, 3, 1, 2), rgb(4)),
        (gray(4)[:, None], gray(4)),
        (rgb(4).astype(np.int64), rgb(4)),
        (rgb(4).astype(np.float32) / 255, rgb(4)),
        (gray(4) / 255.0, gray(4)),
        (np.ones((4, 3, 3)), np.full((4, 3, 3), 255, np.uint8)),
    ],
)
def test_images_of_many_layouts_become_uint8(tmp_path: Path, array: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(pixels(from_npz(npz(tmp_path / "a.npz", images=array, labels=labels(4)))), expected)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("images_train", "labels_train", "images_test", "labels_test"),
    ],
)
def test_the_splits_of_known_conventions_are_kept(tmp_path: Path, names: tuple[str, ...]) -> None:
    arrays = dict(zip(names, (rgb(8), labels(8), rgb(4, seed=1), labels(4)[:, None]), strict=True))
    made(from_npz(npz(tmp_path / "a.npz", **arrays)), tmp_path / "out")
    splits = contents(tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "test": 4}
    for i, image in enumerate(rgb(4, seed=1)):
        label, data = splits["test"][f"{8 + i:08d}"]
        assert label == i % 2
        assert np.array_equal(decode(data), image)


def test_a_test_split_may_have_no_labels(tmp_path: Path) -> None:
    file = npz(tmp_path / "a.npz", x_train=gray(8), y_train=labels(8), x_test=gray(3, 1))
    manifest = made(from_npz(file), tmp_path / "out").manifest
    assert manifest.splits["test"].class_counts == ()


@pytest.mark.parametrize(
    ("values", "names", "classes", "expected"),
    [
        (["b", "a", "b", "a"], None, ("a", "b"), [1, 0, 1, 0]),
        ([5, 3, 5, 10], None, ("3", "5", "10"), [1, 0, 1, 2]),
        ([0, 1, 0, 1], ["no", "yes"], ("no", "yes"), [0, 1, 0, 1]),
        (["yes", "no", "yes", "yes"], ["no", "yes"], ("no", "yes"), [1, 0, 1, 1]),
        ([0, 2, 0, 2], ["a", "b", "c"], ("a", "b", "c"), [0, 2, 0, 2]),
    ],
)
def test_labels_are_numbers_or_text(
    tmp_path: Path, values: list[Any], names: list[str] | None, classes: tuple[str, ...], expected: list[int]
) -> None:
    named = {} if names is None else {"class_names": np.array(names)}
    source = from_npz(npz(tmp_path / "a.npz", images=gray(4), labels=np.array(values), **named))
    assert source.classes == classes
    assert source.labels.tolist() == expected


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": gray(4)}, r"no arrays 'images' and 'labels'.*it has: pictures"),
        ({"images": gray(4)}, r"'images' has no labels beside it"),
        ({"images": gray(4), "labels": labels(3)}, r"labels of the images must be 4 integers"),
        ({"images": gray(4), "labels": labels(4) / 2}, r"must be 4 integers or texts, not float64"),
        ({"images": gray(4), "labels": np.eye(4)}, r"labels of the images must be 4"),
        ({"images": gray(4), "labels": np.zeros(4, int)}, r"1 class"),
        ({"images": gray(4)[0], "labels": labels(4)}, r"shape \(6, 5\)"),
        ({"images": np.zeros((4, 6, 5, 2), np.uint8), "labels": labels(4)}, r"shape \(4, 6, 5, 2\)"),
        ({"images": np.zeros((0, 6, 5), np.uint8), "labels": labels(0)}, r"shape \(0, 6, 5\)"),
        ({"images": gray(4) * 2.0, "labels": labels(4)}, r"float64 from 0 to \d+: give integers 0..255"),
        ({"images": gray(4).astype(np.int16) - 300, "labels": labels(4)}, r"int16 from -300"),
        ({"images": np.full((4, 6, 5), np.nan), "labels": labels(4)}, r"nan"),
        ({"images": gray(4), "labels": labels(4, 3), "classes": np.array(["a", "b"])}, r"label '2' is none of the 2"),
        ({"images": np.array([{}, 1], dtype=object), "labels": labels(2)}, r"without unpickling"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_npz(npz(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more", b"text"])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match=r"cannot read .*a.npz"):
        from_npz(write(tmp_path / "a.npz", data))
    with pytest.raises(DataError, match=r"cannot read .*gone.npz"):
        from_npz(tmp_path / "gone.npz")


def test_a_npy_file_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", gray(3))
    with pytest.raises(DataError, match=r"cannot read .*a.npy"):
        from_npz(tmp_path / "a.npy")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_set(folder: Path, n: int = 20, seed: int = 0, packed: bool = False) -> tuple[Path, Path]:
    images, classes = idx_bytes(gray(n, seed)), idx_bytes(labels(n, 4))
    if packed:
        images, classes = gzip.compress(images, mtime=0), gzip.compress(classes, mtime=0)
    return write(folder / f"images{seed}", images), write(folder / f"labels{seed}", classes)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_packed_or_not(tmp_path: Path, packed: bool) -> None:
    source = from_idx(*idx_set(tmp_path / "fruit", packed=packed))
    assert np.array_equal(pixels(source), gray(20))
    assert source.labels.tolist() == labels(20, 4).tolist()
    assert source.name == "fruit"
    assert source.classes == ("0", "1", "2", "3")
    assert source.split_of.tolist() == [-1] * 20


def test_idx_test_files_become_the_test_split(tmp_path: Path) -> None:
    train, test = idx_set(tmp_path, 20), idx_set(tmp_path, 8, seed=1)
    manifest = made(from_idx(*train, *test), tmp_path / "out").manifest
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 20, "test": 8}
    unlabelled = made(from_idx(*train, test[0]), tmp_path / "out2").manifest
    assert unlabelled.splits["test"].class_counts == ()


GOOD = idx_bytes(gray(4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (b"text text", "not an IDX file"),
        (idx_bytes(labels(4)), r"holds 1 dimensions .*3 of unsigned bytes .*right order"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], r"type 0x0d"),
        (GOOD[:-1], r"should hold 4 x 6 x 5 bytes .*damaged"),
        (GOOD + b"x", r"should hold 4 x 6 x 5 bytes .*damaged"),
        (GOOD[:10], r"damaged"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, r"should hold 4294967295 x"),
        (gzip.compress(GOOD)[:-12], r"cannot read .*bad"),
        (gzip.compress(GOOD)[:-8] + b"12345678", r"cannot read .*bad"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_idx(write(tmp_path / "bad", data), 3)


def test_idx_labels_must_fit(tmp_path: Path) -> None:
    images, _ = idx_set(tmp_path, 20)
    with pytest.raises(DataError, match="must be 20 integers"):
        from_idx(images, write(tmp_path / "l", idx_bytes(labels(19))))
    with pytest.raises(DataError, match="--test-labels without --test-images"):
        from_idx(images, images, None, images)


def test_known_sets_are_told_apart_by_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real files are 60 MB; these small ones take the places of theirs in the table."""
    digits, fashion = idx_set(tmp_path, 20, seed=1), idx_set(tmp_path, 30, seed=2)
    test = idx_set(tmp_path, 10, seed=3)
    parts = ("train images", "train labels")
    table = {read_idx(f, 3 - 2 * i)[1]: ("MNIST", parts[i]) for i, f in enumerate(digits)}
    table |= {read_idx(f, 3 - 2 * i)[1]: ("Fashion-MNIST", parts[i]) for i, f in enumerate(fashion)}
    table |= {
        read_idx(test[0], 3)[1]: ("Fashion-MNIST", "test images"),
        read_idx(test[1], 1)[1]: ("Fashion-MNIST", "test labels"),
    }
    monkeypatch.setattr(idx, "KNOWN", table)
    source = from_idx(*fashion, *test)
    assert source.name == "Fashion-MNIST"
    assert source.classes[9] == "Ankle boot"
    assert source.facts == {"known_set": "Fashion-MNIST"}
    assert from_idx(*digits).classes == tuple("0123456789")
    assert from_idx(*idx_set(tmp_path / "x", 12, seed=9)).facts == {"known_set": "no"}
    with pytest.raises(DataError, match=r"labels2 is of Fashion-MNIST \(train labels\), but .*images1 is of MNIST"):
        from_idx(digits[0], fashion[1])
    with pytest.raises(DataError, match=r"holds Fashion-MNIST's test images, but was given as train images"):
        from_idx(*test, *fashion)
    with pytest.raises(DataError, match="different parts of Fashion-MNIST"):
        from_idx(fashion[0], test[1])


def test_the_table_of_known_sets_has_every_part_once() -> None:
    assert len(idx.KNOWN) == 8
    assert len(set(idx.KNOWN.values())) == 8
    assert all(len(md5) == 32 for md5 in idx.KNOWN)
    assert set(idx.CLASSES) == {name for name, _ in idx.KNOWN.values()}
