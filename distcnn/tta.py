"""Test-time augmentation: the mean of what a network says of several views of an image.

Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, 2024: multi-crop evaluation, by its code.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad

from distcnn.config import TestTimeViews

SHIFT_OF = 32  # pixels of side for each pixel that a view is shifted by


def averaged(model: nn.Module, x_NCHW: torch.Tensor, views: TestTimeViews) -> torch.Tensor:
    """(n, K) logits of normalised images (n, 3, S, S): the mean over the views of each.

    flip: the image and its mirror image. flip-shift: of these a half, and a quarter each of the two shifted by S / 32
    (at least 1) pixels to the upper left and the lower right, over a mirrored border: six views.
    """
    if views == "none":
        logits_NK: torch.Tensor = model(x_NCHW)
        return logits_NK
    both_NK: torch.Tensor = (model(x_NCHW) + model(x_NCHW.flip(3))) / 2
    if views == "flip":
        return both_NK
    side = x_NCHW.shape[-1]
    shift = min(max(side // SHIFT_OF, 1), side - 1)
    wide_NCHW = pad(x_NCHW, (shift,) * 4, mode="reflect")
    shifted = [
        averaged(model, wide_NCHW[:, :, begin : begin + side, begin : begin + side], "flip") for begin in (0, 2 * shift)
    ]
    return both_NK / 2 + (shifted[0] + shifted[1]) / 4
