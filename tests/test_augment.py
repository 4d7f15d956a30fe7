"""Augmentation: what each sample gets follows from its key alone, and is distributed as the papers say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcnn.augment import Augment, cut_box, cutout_boxes, erased_boxes, partners
from distcnn.data import keyed
from distcnn.data.loader import Tile, TileRequest
from distcnn.pixels import Window, crop_padded, mirrored, normalise

CPU = torch.device("cpu")
SIDE = 16
PLAIN = Augment((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), seed=4)
EVERYTHING: dict[str, dict[str, Any]] = {
    "pad": {"padding": 2},
    "translate": {"padding": 3, "reflect": True},
    "flip": {"flip": "random"},
    "alternate": {"flip": "alternate"},
    "trivial": {"trivial": True},
    "jitter": {"jitter": 0.4},
    "erasing": {"erasing": 0.5},
    "cutout": {"cutout": 6},
    "all": {"padding": 2, "flip": "random", "trivial": True, "jitter": 0.4, "erasing": 0.5, "cutout": 4},
}


def make_tile(ids: np.ndarray, side: int = SIDE, epoch: int = 1, step: int = 0) -> Tile:
    """A tile in which the pixels of a sample follow from its id."""
    images = np.stack(
        [np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8) for i in ids.tolist()]
        or [np.empty((0, side, side, 3), dtype=np.uint8)]
    ).reshape(-1, side, side, 3)
    request = TileRequest(epoch, step, 0, ids)
    labels = torch.from_numpy(ids % 7)
    return Tile(request, torch.from_numpy(images), labels, torch.ones(len(ids)))


def ks(draws: np.ndarray, low: float, high: float) -> float:
    """Kolmogorov-Smirnov's distance to uniform, times sqrt(n): 1.95 has p = 0.001."""
    ordered = (np.sort(draws) - low) / (high - low)
    steps = np.arange(len(draws) + 1) / len(draws)
    return float(max(np.abs(ordered - steps[:-1]).max(), np.abs(ordered - steps[1:]).max()) * len(draws) ** 0.5)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_sample_looks_the_same_in_any_batch(name: str) -> None:
    augment = dataclasses.replace(PLAIN, **EVERYTHING[name])
    ids = np.arange(40) * 31
    whole = augment(make_tile(ids), CPU, train=True)[0]
    assert whole.is_contiguous(memory_format=torch.channels_last) and whole.dtype == torch.float32
    order = np.random.default_rng(0).permutation(40)
    for part in (order[:1], order[1:8], order[8:]):
        x_NCHW, targets = augment(make_tile(ids[part]), CPU, train=True)
        assert torch.equal(x_NCHW, whole[part])
        assert targets.labels.tolist() == (ids[part] % 7).tolist()
    assert not torch.equal(whole, augment(make_tile(ids), CPU, train=False)[0]), "it does something"
    later = augment(make_tile(ids, epoch=2), CPU, train=True)[0]
    assert not torch.equal(whole, later), "and something else in the next epoch"


@pytest.mark.parametrize("name", EVERYTHING)
def test_threads_and_a_second_call_change_nothing(name: str) -> None:
    augment = dataclasses.replace(PLAIN, **EVERYTHING[name])
    tile = make_tile(np.arange(64), side=40)
    before = tile.images.clone()
    threads = torch.get_num_threads()
    made = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        made.append(augment(tile, CPU, train=True)[0])
    torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert torch.equal(tile.images, before), "the loader's buffer is not written to"


def test_an_empty_tile_stays_empty() -> None:
    for options in EVERYTHING.values():
        x_NCHW, targets = dataclasses.replace(PLAIN, **options)(make_tile(np.arange(0)), CPU, train=True)
        assert x_NCHW.shape == (0, 3, SIDE, SIDE) and len(targets.labels) == 0


def test_normalise_is_the_textbook_formula() -> None:
    images = make_tile(np.arange(5)).images
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    expected = (images.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(
        std
    ).double()[:, None, None]
    assert (normalise(images, mean, std).double() - expected).abs().max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 20), st.integers(0, 5), st.booleans(), st.data())
def test_crops_are_those_of_a_padded_image(n: int, side: int, padding: int, reflect: bool, data: st.DataObject) -> None:
    padding = min(padding, side - 1)
    images = make_tile(np.arange(n), side).images
    top = np.array(data.draw(st.lists(st.integers(0, 2 * padding), min_size=n, max_size=n)))
    left = np.array(data.draw(st.lists(st.integers(0, 2 * padding), min_size=n, max_size=n)))
    width = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(images.numpy(), width, mode="reflect" if reflect else "constant")
    cropped = crop_padded(images, Window(top, left, padding, reflect))
    for i in range(n):
        expected = padded[i, top[i] : top[i] + side, left[i] : left[i] + side]
        assert np.array_equal(cropped[i].numpy(), expected)


@pytest.mark.parametrize("side", [1, 2, 31, 32, 150])
def test_mirror(side: int) -> None:
    images = make_tile(np.arange(9), side).images
    flipped = np.arange(9) % 3 != 0
    out = mirrored(images, flipped)
    together = normalise(images, (0, 0, 0), (1, 1, 1), flipped)
    assert torch.equal(together, normalise(out, (0, 0, 0), (1, 1, 1)))
    for i in range(9):
        expected = images[i].flip(1) if flipped[i] else images[i]
        assert torch.equal(out[i], expected)


def test_crops_are_uniform_over_all_shifts() -> None:
    """A white pixel in a black image says where the crop was: 25 places, chi-square with 24 degrees of freedom."""
    n, side, padding = 10_000, 5, 2
    images = torch.zeros((n, side, side, 3), dtype=torch.uint8)
    images[:, 2, 2] = 255
    window = dataclasses.replace(PLAIN, padding=padding).window(np.arange(n), 3)
    assert window is not None
    moved = crop_padded(images, window)
    where = moved[..., 0].reshape(n, -1).int().argmax(dim=1).numpy()
    counts = np.bincount(where, minlength=25)
    assert ((counts - n / 25) ** 2 / (n / 25)).sum() < 51.2


def test_half_of_the_images_are_mirrored_and_others_in_the_next_epoch() -> None:
    ids = np.arange(20_000)
    images = torch.zeros((len(ids), 1, 2, 3), dtype=torch.uint8)
    images[:, :, 0] = 255
    augment = dataclasses.replace(PLAIN, flip="random")
    flips = [mirrored(images, augment.flipped(ids, epoch))[:, 0, 1, 0].numpy() > 0 for epoch in range(3)]
    assert all(abs(f.mean() - 0.5) < 4 * 0.5 / len(ids) ** 0.5 for f in flips)
    assert abs((flips[0] == flips[1]).mean() - 0.5) < 4 * 0.5 / len(ids) ** 0.5


def test_alternating_flip_shows_both_sides_in_any_two_epochs() -> None:
    ids = np.arange(20_000)
    images = torch.zeros((len(ids), 1, 2, 3), dtype=torch.uint8)
    images[:, :, 0] = 255
    augment = dataclasses.replace(PLAIN, flip="alternate")
    flips = [mirrored(images, augment.flipped(ids, epoch))[:, 0, 1, 0].numpy() > 0 for epoch in range(4)]
    assert abs(flips[0].mean() - 0.5) < 4 * 0.5 / len(ids) ** 0.5
    assert (flips[0] != flips[1]).all() and (flips[0] == flips[2]).all() and (flips[1] == flips[3]).all()


def test_jitter_factors_are_uniform() -> None:
    """On a gray image only brightness shows."""
    n = 5000
    images = torch.full((n, 2, 2, 3), 100, dtype=torch.uint8)
    out = dataclasses.replace(PLAIN, jitter=0.4).recolour(images, np.arange(n), 0)
    factors = out[:, 0, 0, 0].double().numpy() / 100
    assert ks(factors, 0.6, 1.4) < 1.95
    assert 0.599 < factors.min() < 0.602 and 1.398 < factors.max() < 1.401


def test_jitter_of_saturation_and_contrast() -> None:
    """Of colour: a saturation of 0 leaves gray. Of contrast: the mean stays, the spread is scaled."""
    images = make_tile(np.arange(200), side=32).images // 4 + 96  # 96 .. 159: nothing is clamped
    augment = dataclasses.replace(PLAIN, jitter=0.3)
    out = augment.recolour(images, np.arange(200), 0)
    brightness, contrast, saturation = 0.7 + 0.6 * keyed.uniforms(
        np.arange(200), PLAIN.seed, 0, (keyed.BRIGHTNESS, keyed.CONTRAST, keyed.SATURATION)
    )
    weights = torch.tensor([0.2989, 0.587, 0.114])
    gray_before, gray = ((x.float() * weights).sum(-1) for x in (images, out))
    assert np.allclose(gray.mean((1, 2)) / gray_before.mean((1, 2)), brightness, atol=0.02)
    assert np.allclose(gray.std((1, 2)) / gray_before.std((1, 2)), brightness * contrast, atol=0.02)
    colour_before, colour = ((x.float() - g[..., None]).std((1, 2, 3)) for x, g in ((images, gray_before), (out, gray)))
    assert np.allclose(colour / colour_before, brightness * contrast * saturation, atol=0.03)


def test_random_erasing_agrees_with_torchvision() -> None:
    """Two samples of one distribution: two-sample Kolmogorov-Smirnov for each number of the box."""
    from torchvision.transforms import RandomErasing

    n, side = 4000, 64
    boxes = erased_boxes(np.arange(2 * n), side, 0.5, 1, 0)
    hit = boxes[:, 2] > 0
    assert abs(hit.mean() - 0.5) < 4 * 0.5 / (2 * n) ** 0.5
    mine = boxes[hit]
    torch.manual_seed(0)
    blank = torch.empty(3, side, side)
    theirs = np.array([RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(n)])
    for column in range(4):
        values = np.arange(side + 1)
        a = np.searchsorted(np.sort(mine[:, column]), values, "right") / len(mine)
        b = np.searchsorted(np.sort(theirs[:, column]), values, "right") / n
        assert np.abs(a - b).max() < 1.95 * (1 / n + 1 / len(mine)) ** 0.5
    assert (mine[:, 0] + mine[:, 2] <= side).all() and (mine[:, 1] + mine[:, 3] <= side).all()


def test_erased_boxes_are_filled_with_the_mean() -> None:
    augment = dataclasses.replace(PLAIN, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), erasing=1.0)
    tile = make_tile(np.arange(50), side=32)
    out = augment(tile, CPU, train=True)[0]
    plain = augment(tile, CPU, train=False)[0]
    for i, (top, left, height, width) in enumerate(erased_boxes(np.arange(50), 32, 1.0, 4, 1).tolist()):
        inside = torch.zeros((32, 32), dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (out[i][:, inside] == 0).all()
        assert torch.equal(out[i][:, ~inside], plain[i][:, ~inside])


def test_cutout_centres_are_uniform_and_cut_at_the_edges() -> None:
    n, side, size = 20_000, 16, 6
    top, left, height, width = cutout_boxes(np.arange(n), side, size, 1, 0).T
    assert (top >= 0).all() and (top + height <= side).all() and (left >= 0).all() and (left + width <= side).all()
    assert height.max() == width.max() == size and height.min() == 3
    for start, length in ((top, height), (left, width)):
        middle = np.where(start > 0, start + 3, length - 3)
        counts = np.bincount(middle, minlength=side)
        assert ((counts - n / side) ** 2 / (n / side)).sum() < 37.7  # 15 degrees of freedom, p = 0.001


# MixUp and CutMix: partners of the same tile, one share a tile.


def test_partners_are_uniform_permutations() -> None:
    """24 orders of 4 places over 4,800 tiles: chi-square with 23 degrees of freedom."""
    seen: dict[tuple[int, ...], int] = {}
    for step in range(4800):
        order = tuple(partners(4, keyed.tile_key(step, 3), 9, 1).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 49.7
    assert sorted(partners(100, keyed.tile_key(2**30, 7), 9, 1).tolist()) == list(range(100)), "any step number"


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_the_convex_sum_that_the_targets_say(alpha: float) -> None:
    augment = dataclasses.replace(PLAIN, mixup=alpha)
    shares = []
    for step in range(300):
        tile = make_tile(np.arange(6), side=4, step=step)
        x, targets = augment(tile, CPU, train=True)
        plain = augment(tile, CPU, train=False)[0]
        partner = torch.from_numpy(partners(6, keyed.tile_key(step, 0), 4, 1))
        assert torch.allclose(x, plain * targets.share + plain[partner] * (1 - targets.share))
        assert targets.partner_labels.tolist() == targets.labels[partner].tolist()
        shares.append(targets.share)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(np.mean(shares) - 0.5) < 4 * (variance / 300) ** 0.5
    assert 0.75 < np.var(shares) / variance < 1.3


def test_cutmix_pastes_a_box_and_the_share_is_what_is_left() -> None:
    augment = dataclasses.replace(PLAIN, cutmix=1.0)
    shares = []
    for step in range(400):
        tile = make_tile(np.arange(5), side=SIDE, step=step)
        x, targets = augment(tile, CPU, train=True)
        plain = augment(tile, CPU, train=False)[0]
        partner = torch.from_numpy(partners(5, keyed.tile_key(step, 0), 4, 1))
        own = (x == plain).all(1)  # (n, S, S)
        other = (x == plain[partner]).all(1)
        assert (own | other).all(), "every pixel is one's own or one's partner's"
        moved = partner != torch.arange(5)
        for i in torch.nonzero(moved)[:, 0].tolist():
            assert abs(float(own[i].float().mean()) - targets.share) < 1e-6
        assert all(torch.equal(own[i], own[j]) for i in torch.nonzero(moved) for j in torch.nonzero(moved)), (
            "one box a tile"
        )
        shares.append(targets.share)
    assert min(shares) < 0.2 and max(shares) > 0.9


def test_both_mixes_are_drawn_equally_often() -> None:
    augment = dataclasses.replace(PLAIN, mixup=1.0, cutmix=1.0)
    pasted = 0
    for step in range(400):
        tile = make_tile(np.arange(4), side=8, step=step)
        x, _ = augment(tile, CPU, train=True)
        pasted += bool(((x * 255).round() - x * 255).abs().max() < 1e-3)  # CutMix only copies whole values
    assert abs(pasted / 400 - 0.5) < 4 * 0.5 / 20


def test_a_sample_of_weight_0_weakens_its_partner_too() -> None:
    tile = make_tile(np.arange(6), side=4)
    tile = dataclasses.replace(tile, weights=torch.tensor([1.0, 0, 1, 1, 1, 1]))
    _, targets = dataclasses.replace(PLAIN, mixup=1.0)(tile, CPU, train=True)
    partner = partners(6, keyed.tile_key(0, 0), 4, 1)
    expected = [0.0 if i == 1 or partner[i] == 1 else 1.0 for i in range(6)]
    assert targets.weights.tolist() == expected


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_cut_boxes_lie_within_the_image(side: int, share: float, u: float, v: float) -> None:
    top, bottom, left, right = cut_box(side, share, u, v)
    assert 0 <= top <= bottom <= side and 0 <= left <= right <= side
    assert (bottom - top) * (right - left) <= (np.sqrt(1 - share) * side + 1) ** 2
