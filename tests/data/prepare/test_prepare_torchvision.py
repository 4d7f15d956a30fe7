from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from prepare_files import contents, jpg, made, write
from test_prepare_arrays import gray, idx_bytes, labels

from distcnn.data.decode import decode
from distcnn.data.prepare.torchvision_sets import from_torchvision
from distcnn.errors import UserError


def mnist_files(root: Path, name: str) -> None:
    for part, n, seed in (("train", 30, 1), ("t10k", 12, 2)):
        write(root / name / "raw" / f"{part}-images-idx3-ubyte", idx_bytes(gray(n, seed)))
        write(root / name / "raw" / f"{part}-labels-idx1-ubyte", idx_bytes(labels(n, 10)))


def test_sets_of_arrays_keep_their_splits_and_classes(tmp_path: Path) -> None:
    mnist_files(tmp_path, "FashionMNIST")
    source = from_torchvision("FashionMNIST", tmp_path)
    assert source.classes[:2] == ("T-shirt/top", "Trouser")
    made(source, tmp_path / "out")
    splits = contents(tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 30, "test": 12}
    for i, image in enumerate(gray(12, 2)):
        label, data = splits["test"][f"{30 + i:08d}"]
        assert label == i % 10
        assert np.array_equal(decode(data)[:, :, 0], image)


def test_cifar_arrays_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches in CIFAR-10's form; only the checksums are not the real ones."""
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    rng = np.random.default_rng(0)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for name, _ in kind.train_list + kind.test_list:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    source = from_torchvision("CIFAR10", tmp_path)
    assert source.classes == tuple(meta["label_names"])
    assert np.bincount(source.split_of, minlength=3).tolist() == [20, 0, 4]
    first = torchvision.datasets.CIFAR10(str(tmp_path), train=True)[0]
    assert np.array_equal(source.payload(0), np.asarray(first[0]))


def test_sets_of_files_hand_over_the_files(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / "eurosat" / "2750" / ("Forest", "River")[i % 2] / f"{i}.jpg", jpg(i))
    made(from_torchvision("EuroSAT", tmp_path), tmp_path / "out")
    splits = contents(tmp_path / "out")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 18, "val": 2}
    rows = splits["train"] | splits["val"]
    assert rows["eurosat/2750/River/7"] == (1, jpg(7))


def test_sets_that_make_images_are_decoded_and_kept_without_loss(tmp_path: Path) -> None:
    class Fake(torchvision.datasets.FakeData):
        def __init__(self) -> None:
            super().__init__(size=12, image_size=(3, 9, 11), num_classes=2)

    torchvision.datasets.FakeData, original = Fake, torchvision.datasets.FakeData
    try:
        source = from_torchvision("FakeData", tmp_path)
    finally:
        torchvision.datasets.FakeData = original
    made(source, tmp_path / "out", val_fraction=0.0)
    for key, (label, data) in contents(tmp_path / "out")["train"].items():
        image, expected = Fake()[int(key)]
        assert label == int(expected)
        assert np.array_equal(decode(data), np.asarray(image))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", r"no data set 'CIFAR11'; did you mean 'CIFAR10'"),
        ("CIFAR10", r"torchvision's CIFAR10 cannot be opened in .*not found.*--download"),
        ("FashionMNIST", r"torchvision's FashionMNIST cannot be opened .*--download"),
        ("wrap_dataset_for_transforms_v2", r"no data set"),
        ("CocoDetection", r"cannot be opened"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_torchvision(name, tmp_path)
    assert "\n" not in str(caught.value)
