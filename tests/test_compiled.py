"""Numba's kernels: the bits of torch, no index outside its array, and a run that is the same without them."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcnn import compiled, numba_kernels, pixels
from distcnn.data import resize
from distcnn.data.resize import resize_into
from distcnn.pixels import Window, normalise
from tests.support import check_indices

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def noise(seed: int, *shape: int) -> np.ndarray:
    """Bytes, in some images only black and white ones: what rounds worst."""
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return values if seed % 3 else (values & 128) // 128 * np.uint8(255)


def test_they_are_there() -> None:
    assert resize.upscale_kernel() is not None and pixels.finish_kernel() is not None


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.integers(0, 99), st.data())
def test_scaling_up_gives_torchs_bits(height: int, width: int, side: int, seed: int, data: st.DataObject) -> None:
    h = data.draw(st.integers(1, min(height, side)))
    w = data.draw(st.integers(1, min(width, side)))
    box = (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
    image = noise(seed, height, width, 3)
    start = data.draw(st.integers(0, 9))
    memory = np.concatenate([noise(seed + 1, start), image.reshape(-1), noise(seed + 2, 4)])
    slots = noise(seed, 2, side, side, 3)
    untouched = slots[0].copy()
    upscale = resize.upscale_kernel()
    assert upscale is not None
    upscale(memory, np.array([(1, start, height, width, *box)]), slots)
    expected = np.empty((side, side, 3), dtype=np.uint8)
    resize_into(expected, image, box)
    assert np.array_equal(slots[1], expected)
    assert np.array_equal(slots[0], untouched)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 50), st.booleans(), st.booleans(), st.data())
def test_cropping_mirroring_and_normalising_give_torchs_bits(
    n: int, side: int, padding: int, reflect: bool, flips: bool, data: st.DataObject
) -> None:
    padding = min(padding, side - 1) if reflect else padding
    images = torch.from_numpy(noise(n + side, n, side, side, 3))
    shift = st.lists(st.integers(0, 2 * padding), min_size=n, max_size=n).map(np.array)
    window = Window(data.draw(shift), data.draw(shift), padding, reflect)
    flipped = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) if flips else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "finish_kernel", lambda: None)
        expected = normalise(images, MEAN, STD, flipped, window)
        plain = normalise(images, MEAN, STD)
    found = normalise(images, MEAN, STD, flipped, window)
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalise(images, MEAN, STD), plain)


def test_inputs_are_float32_whatever_torchs_default_is() -> None:
    images = torch.from_numpy(noise(1, 3, 8, 8, 3))
    before = normalise(images, MEAN, STD)
    torch.set_default_dtype(torch.float64)
    try:
        found = normalise(images, MEAN, STD)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, before)


CHECKED = """
import numpy as np
from distcnn import numba_kernels as k

rng = np.random.default_rng(1)
for _ in range(400):
    side, height, width, n = rng.integers(1, 40, 4)
    h, w = rng.integers(1, min(height, side) + 1), rng.integers(1, min(width, side) + 1)
    box = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    memory = np.zeros(height * width * 3 + 4, np.uint8)
    k.upscale(memory, np.array([(0, 0, height, width, *box)]), np.zeros((1, side, side, 3), np.uint8))
    reflect = bool(rng.integers(2))
    most = side if reflect else side + 5
    top, left = rng.integers(1 - most, most, (2, n))
    row = np.ones(side * 3, np.float32)
    images = np.zeros((n, side, side, 3), np.uint8)
    k.finish(images, top, left, reflect, rng.random(n) < 0.5, row, row, images.astype(np.float32))
try:
    last_pixel = (0, 0, height, width, height - 1, width - 1, 1, 1)
    k.upscale(memory[:-5], np.array([last_pixel]), np.zeros((1, 9, 9, 3), np.uint8))
except IndexError:
    print("checked")
"""


def test_no_index_leaves_its_array(tmp_path: Path) -> None:
    """Compiled with checks of every index; too short a memory shows that they are made."""
    check_indices(CHECKED, tmp_path)


Choice = Callable[[ModuleType], tuple[Any, str]]
FINISH: Choice = lambda kernels: (numba.njit(kernels.finish.py_func), kernels.FINISH)  # noqa: E731


def test_one_whose_bits_are_others_is_not_used() -> None:
    with pytest.warns(RuntimeWarning, match="does not give the bits"):
        assert compiled.kernel(FINISH, lambda kernel: False)() is None


def test_one_that_cannot_be_compiled_is_not_used() -> None:
    def choose(kernels: ModuleType) -> tuple[Any, str]:
        return numba.njit(lambda value: value.nothing), "(int64,)"

    with pytest.warns(RuntimeWarning, match="torch takes longer .TypingError: "):
        assert compiled.kernel(choose, lambda kernel: True)() is None


def test_without_numba_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.kernel(FINISH, lambda kernel: True)() is None


def test_where_numba_may_not_compile_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert compiled.kernel(FINISH, lambda kernel: True)() is None


def test_threads_that_ask_at_once_get_one_and_the_same() -> None:
    asked: list[int] = []

    def choose(kernels: ModuleType) -> tuple[Any, str]:
        asked.append(1)
        return FINISH(kernels)

    get, got = compiled.kernel(choose, lambda kernel: True), list[Any]()
    threads = [threading.Thread(target=lambda: got.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1 and len(got) == 4
    assert got[0] is not None and all(kernel is got[0] for kernel in got)
    assert numba.config.SLP_VECTORIZE == 0, "as it was"


def test_the_kernels_need_no_interpreter() -> None:
    """Object mode would be as slow as Python, and hold its lock."""
    assert resize.upscale_kernel() is numba_kernels.upscale and pixels.finish_kernel() is numba_kernels.finish
    for kernel in (numba_kernels.upscale, numba_kernels.finish):
        assert kernel.targetoptions["nogil"] and kernel.nopython_signatures
