"""The kernels' ways for a GPU, run on the CPU beside the CPU's own. (What they make of images: test_augment.py.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distcnn.pixels import _put_by_choosing_, put_


@pytest.mark.parametrize("which", [[], [0], [4, 1], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_both_ways_of_putting_images_are_one(which: list[int], kind: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (5, 4, 4, 3), generator=noise).to(kind)
    places = np.array(which, dtype=np.int64)
    values = torch.randint(0, 256, (len(which), 4, 4, 3), generator=noise).to(kind)
    expected = images.clone()
    expected[places] = values
    for put in (put_, _put_by_choosing_) if which else (put_,):
        found = images.clone()
        put(found, places, values)
        assert torch.equal(found, expected)
