from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from data_sets import look, make_set, many, noisy_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import encode

from distcnn.data.inspect.near import alike, groups, near_pairs, perceptual_hash, same_details


@given(st.integers(0, 8), st.integers(0, 10_000), st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_near_pairs_are_all_pairs_within_the_radius(radius: int, seed: int, clusters: int) -> None:
    """Against a comparison of each with each, on hashes in clusters of up to 10 changed bits."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, clusters, dtype=np.uint64)
    bits = np.uint64(1) << rng.integers(0, 64, (300, 10), dtype=np.uint64)
    kept = np.where(rng.integers(0, 11, (300, 1)) > np.arange(10), bits, np.uint64(0))
    hashes = np.unique(rng.choice(centres, 300) ^ np.bitwise_xor.reduce(kept, axis=1))
    rng.shuffle(hashes)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = np.argwhere(np.triu(distance <= radius, 1))
    found, used = near_pairs(hashes, radius)
    assert used == radius
    assert found.tolist() == expected.tolist()


def test_equal_hashes_are_chained_and_few_or_none_are_no_trouble() -> None:
    assert near_pairs(np.zeros(4, np.uint64))[0].tolist() == [[0, 1], [1, 2], [2, 3]]
    for count in (0, 1):
        assert near_pairs(np.zeros(count, np.uint64))[0].shape == (0, 2)


def test_when_everything_looks_alike_the_radius_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.inspect.near.MAX_PAIRS", 2000)
    hashes = np.arange(300, dtype=np.uint64)
    found, radius = near_pairs(hashes)
    assert radius == 2 or radius == 1
    assert 0 < len(found) <= 300 * 300
    assert (np.bitwise_count(hashes[found[:, 0]] ^ hashes[found[:, 1]]) <= radius).all()


def canvas(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX))


def same_picture(image: np.ndarray) -> list[np.ndarray]:
    """The picture as it comes back from other hands: JPEG, half the size, brighter, less contrast."""
    half = Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2), Image.Resampling.LANCZOS)
    jpeg = np.asarray(Image.open(io.BytesIO(encode(image, "JPEG", quality=60))))
    return [jpeg, np.asarray(half), (image * 0.8 + 40).astype(np.uint8), np.clip(image + 25.0, 0, 255).astype(np.uint8)]


def luma(images: list[np.ndarray]) -> np.ndarray:
    return (np.stack([canvas(image) for image in images]) @ np.array([0.299, 0.587, 0.114])).astype(np.float32)


def test_the_same_picture_is_found_and_others_are_not() -> None:
    pictures = [noisy_picture(seed) for seed in range(30)]
    images = [image for one in pictures for image in [one, *same_picture(one)]]
    canvases = luma(images)
    thumbs = np.rint(canvases.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4))).astype(np.uint8)
    pairs, score = alike(thumbs, near_pairs(perceptual_hash(canvases))[0])
    assert ((pairs[:, 0] // 5) == (pairs[:, 1] // 5)).all()
    assert [len(group) for group in groups(pairs)] == [5] * 30
    assert (np.diff(score) <= 0).all()


def test_what_is_alike_depends_on_how_alike_a_class_is_anyway() -> None:
    """Photographs: 0.8. One shape with some noise, as with handwritten digits: nearly equal."""
    photographs = np.random.default_rng(0).integers(0, 256, (200, 16, 16))
    labels = np.arange(200, dtype=np.int32) % 3
    assert same_details(photographs.astype(np.uint8), labels) == 0.8
    digits = photographs[:3][labels] * 0.8 + photographs * 0.2
    assert same_details(digits.astype(np.uint8), labels) > 0.95
    for few in (0, 1, 2, 99):
        assert same_details(digits[:few].astype(np.uint8), labels[:few]) == 0.8


def test_blank_images_are_not_called_alike() -> None:
    """A white and a black page have no details to compare."""
    thumbs = np.stack([np.full((16, 16), 250), np.full((16, 16), 3), np.full((16, 16), 250)]).astype(np.uint8)
    thumbs[[0, 2], ::4, ::4] += 1  # as JPEG leaves traces on a blank page
    assert len(alike(thumbs, np.array([[0, 1], [0, 2]]))[0]) == 0


def test_a_copy_is_not_counted_as_a_look_alike_too(tmp_path: Path) -> None:
    """An image of val that is in train byte for byte, and once more as a JPEG."""
    image = noisy_picture(5)
    train = [("a/1.png", encode(image)), ("a/2.jpg", encode(image, "JPEG", quality=90)), *many("b", 3)]
    like = look(make_set(tmp_path, {"train": train, "val": [("a/1.png", encode(image))]})).likeness
    assert [(leak.exact, leak.near) for leak in like.leaks] == [(1, 0)]
    assert (like.copies, like.near) == (1, 2)
    assert [len(group) for group in like.groups] == [3]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([], []), ([[3, 4]], [[3, 4]]), ([[0, 1], [5, 6], [1, 9], [6, 5], [7, 0]], [[0, 1, 7, 9], [5, 6]])],
)
def test_groups(pairs: list[list[int]], expected: list[list[int]]) -> None:
    assert [group.tolist() for group in groups(np.array(pairs, dtype=np.int64).reshape(-1, 2))] == expected
