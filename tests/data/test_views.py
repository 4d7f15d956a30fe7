"""Boxes are drawn as the papers say and stay inside; scaling agrees with Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import picture

from distcnn.data.resize import resize_into
from distcnn.data.views import RATIO_RANGE, ProgressiveView, View

N = 20_000


def boxes_of(view: View, height: int, width: int, n: int = N, epoch: int = 0) -> np.ndarray:
    ids = np.arange(n)
    return view.boxes(ids, np.full(n, height), np.full(n, width), 1, epoch)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    st.sampled_from(["center", "random-resized"]),
    st.floats(0.01, 1.0),
)
def test_boxes_lie_within_the_image_and_do_not_depend_on_the_batch(
    sizes: list[tuple[int, int]], kind: str, scale: float
) -> None:
    view = View(8, kind, scale)  # type: ignore[arg-type]
    heights, widths = np.array(sizes).T
    ids = np.arange(len(sizes)) * 977
    boxes = view.boxes(ids, heights, widths, 3, 2)
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()
    one = view.boxes(ids[-1:], heights[-1:], widths[-1:], 3, 2)
    assert one.tolist() == boxes[-1:].tolist()


def test_random_resized_boxes_are_pinned() -> None:
    """Another value here changes what every run ever made has seen."""
    assert boxes_of(View(224, "random-resized"), 375, 500, 2).tolist() == [[4, 2, 356, 470], [14, 153, 354, 275]]


def test_random_resized_draws_area_and_log_ratio_uniformly() -> None:
    """In an image so large that nearly every first try fits; Kolmogorov-Smirnov, 1.95 / sqrt(n) has p = 0.001."""
    boxes = boxes_of(View(8, "random-resized", 0.1), 4000, 4000)
    area = boxes[:, 2] * boxes[:, 3] / 4000**2
    small = area < 0.5  # below this every ratio fits, so nothing was rejected
    assert ks(area[small], 0.1, 0.5) < 1.95 / np.sqrt(small.sum())
    ratio = np.log(boxes[small, 3] / boxes[small, 2])
    assert ks(ratio, *np.log(RATIO_RANGE)) < 1.95 / np.sqrt(small.sum())
    assert abs(np.corrcoef(area[small], ratio)[0, 1]) < 4 / np.sqrt(small.sum())


def test_random_resized_positions_are_uniform() -> None:
    boxes = boxes_of(View(8, "random-resized", 0.1), 4000, 3000)
    for start, length, side in ((0, 2, 4000), (1, 3, 3000)):
        place = (boxes[:, start] + 0.5) / (side - boxes[:, length] + 1)
        free = side - boxes[:, length] > 300
        assert ks(place[free], 0, 1) < 1.95 / np.sqrt(free.sum()) + 1 / 300


def test_random_resized_agrees_with_torchvision() -> None:
    """Two samples of the same distribution, rejections and fallback included: two-sample Kolmogorov-Smirnov."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    n = 4000
    for height, width in ((100, 400), (375, 500)):
        mine = boxes_of(View(8, "random-resized", 0.35), height, width, n)
        blank = torch.empty(1, height, width)
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(blank, [0.35, 1.0], list(RATIO_RANGE)) for _ in range(n)])
        for column in range(4):
            values = np.unique(np.concatenate([mine[:, column], theirs[:, column]]))
            a = np.searchsorted(np.sort(mine[:, column]), values, "right") / n
            b = np.searchsorted(np.sort(theirs[:, column]), values, "right") / n
            assert np.abs(a - b).max() < 1.95 * np.sqrt(2 / n)


def test_epochs_draw_anew() -> None:
    view = View(8, "random-resized")
    assert (boxes_of(view, 300, 300, 100, 0) != boxes_of(view, 300, 300, 100, 1)).any(axis=1).all()


CENTERS = [((256, 256), (16, 16, 224, 224)), ((256, 512), (16, 144, 224, 224)), ((1, 1), (0, 0, 1, 1))]


@pytest.mark.parametrize(("size", "expected"), [*CENTERS, ((9, 400), (0, 196, 8, 8))])
def test_center_boxes(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert boxes_of(View(224, "center"), *size, 1).tolist() == [list(expected)]


@pytest.mark.parametrize(
    ("sizes", "epochs", "expected"),
    [
        ((8,), 3, [8, 8, 8, 8]),
        ((8, 16), 4, [8, 8, 16, 16, 16]),
        ((8, 16), 3, [8, 8, 16, 16]),
        ((16, 8, 24), 2, [16, 8, 24]),  # more sizes than epochs: some never come
        ((4, 4, 4, 6), 8, [4, 4, 4, 4, 4, 4, 6, 6]),
    ],
)
def test_sizes_in_turn_for_equal_shares_of_the_epochs(sizes: tuple[int, ...], epochs: int, expected: list[int]) -> None:
    view = ProgressiveView.of(sizes, epochs, 0.5)
    assert [view.at(epoch).size for epoch in range(len(expected))] == expected
    assert view.at(0) == View(sizes[0], "random-resized", 0.5) and view.size == max(sizes)
    assert View(8, "center").at(7) == View(8, "center")


@pytest.mark.parametrize(("size", "scale"), [(0, 0.5), (8, 0.0), (8, 1.5)])
def test_impossible_views_are_refused(size: int, scale: float) -> None:
    with pytest.raises(ValueError, match="view of"):
        View(size, "center", scale)


@pytest.mark.parametrize("box", [(0, 0, 60, 80), (3, 5, 40, 40), (10, 20, 7, 31), (0, 0, 16, 16), (59, 79, 1, 1)])
def test_scaling_is_antialiased_bilinear_as_pillow_does_it(box: tuple[int, int, int, int]) -> None:
    pixels = picture(1, 60, 80)
    out = np.empty((16, 16, 3), dtype=np.uint8)
    resize_into(out, pixels, box)
    top, left, height, width = box
    cut = Image.fromarray(pixels[top : top + height, left : left + width])
    expected = np.asarray(cut.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(out.astype(int) - expected).max() <= 1


def ks(draws: np.ndarray, low: float, high: float) -> float:
    """The Kolmogorov-Smirnov distance between draws and the uniform distribution on low..high."""
    ordered = (np.sort(draws) - low) / (high - low)
    steps = np.arange(len(draws) + 1) / len(draws)
    return float(max(np.abs(ordered - steps[:-1]).max(), np.abs(ordered - steps[1:]).max()))
