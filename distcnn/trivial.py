"""TrivialAugment (Müller & Hutter, "TrivialAugment: Tuning-free yet state-of-the-art data augmentation", ICCV 2021).

One operation an image, drawn uniformly, with a strength drawn uniformly: the "wide" space, as torchvision's
TrivialAugmentWide has it. Here the images of a batch that drew the same operation are worked on together, on any
device. Integer sums and single rounded operations only, so an image comes out the same in any batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from distcnn.data import keyed
from distcnn.data.order import Ids
from distcnn.kernels import in_any_order
from distcnn.pixels import put_, to_device

BINS = 31
Strengths = NDArray[np.float64]  # (g,) one for each image of a group


def trivial_augment(images_NHWC: torch.Tensor, ids: Ids, seed: int, epoch: int) -> torch.Tensor:
    """(n, H, W, 3) uint8: each image with its own operation."""
    operation, strength = draw(ids, seed, epoch)
    out = images_NHWC.clone()
    for number, (_, apply, _) in enumerate(OPERATIONS):
        which = np.flatnonzero(operation == number)
        if apply is not None and len(which):
            some = images_NHWC.index_select(0, to_device(which, out.device))
            put_(out, which, apply(some, strength[which]))
    return out


def draw(ids: Ids, seed: int, epoch: int) -> tuple[Ids, Strengths]:
    """(number in OPERATIONS, strength) for each id, both (n,)."""
    kind, level, sign = keyed.uniforms(ids, seed, epoch, (keyed.TRIVIAL_KIND, keyed.TRIVIAL_LEVEL, keyed.TRIVIAL_SIGN))
    operation = (kind * len(OPERATIONS)).astype(np.int64)
    level = np.floor(level * BINS) / (BINS - 1)  # 0 .. 1 in 31 steps
    largest = np.array([largest for _, _, largest in OPERATIONS])[operation]
    return operation, np.where(sign < 0.5, level, -level) * largest


def _affine(images: torch.Tensor, matrix: NDArray[np.float64], shift: NDArray[np.float64]) -> torch.Tensor:
    """Pixel (x, y) of each image comes from `matrix` (g, 2, 2) @ (x, y) + `shift` (g, 2), the nearest; outside: black.

    Coordinates count from the middle of the image. The sum of one term for the column and one for the row is computed
    in float64: the same pixels on any device.
    """
    g, height, width = images.shape[:3]
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    sources = []
    for axis, middle in ((0, (width - 1) / 2), (1, (height - 1) / 2)):
        by_column = matrix[:, axis, :1] * x + (shift[:, axis, None] + middle)  # (g, W)
        by_row = matrix[:, axis, 1:] * y  # (g, H)
        total = to_device(by_row, images.device)[:, :, None] + to_device(by_column, images.device)[:, None, :]
        sources.append(total.round_().to(torch.int64))  # (g, H, W)
    column, row = sources
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    place = row.mul_(width).add_(column).masked_fill_(outside, 0).view(g, -1)
    pixels = torch.nn.functional.pad(images, (0, 1)).view(torch.int32).view(g, -1)  # 4 bytes a pixel: one gather
    picked = pixels.gather(1, place).masked_fill_(outside.view(g, -1), 0)
    return picked.view(torch.uint8).view(g, height, width, 4)[..., :3]


def _matrices(g: int, **entries: Strengths) -> NDArray[np.float64]:
    """(g, 2, 2): identities with some entries replaced, named xx, xy, yx, yy (row, column)."""
    out = np.tile(np.eye(2), (g, 1, 1))
    for name, values in entries.items():
        out[:, "xy".index(name[0]), "xy".index(name[1])] = values
    return out


def _still(g: int) -> NDArray[np.float64]:
    return np.zeros((g, 2))


def _shear_x(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    """The upper edge stays where it is."""
    shift = np.stack([s * images.shape[1] / 2, np.zeros_like(s)], axis=1)
    return _affine(images, _matrices(len(s), xy=s), shift)


def _shear_y(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    """The left edge stays where it is."""
    shift = np.stack([np.zeros_like(s), s * images.shape[2] / 2], axis=1)
    return _affine(images, _matrices(len(s), yx=s), shift)


def _translate_x(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    return _affine(images, _matrices(len(s)), np.stack([-np.trunc(s), np.zeros_like(s)], axis=1))


def _translate_y(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    return _affine(images, _matrices(len(s)), np.stack([np.zeros_like(s), -np.trunc(s)], axis=1))


def _rotate(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    angle = np.deg2rad(s)
    cos, sin = np.cos(angle), np.sin(angle)
    return _affine(images, _matrices(len(s), xx=cos, xy=-sin, yx=sin, yy=cos), _still(len(s)))


def column_of(values: Strengths, images: torch.Tensor) -> torch.Tensor:
    """(g, 1, 1, 1) float32 on the images' device."""
    return to_device(values.astype(np.float32), images.device)[:, None, None, None]


def blend(images: torch.Tensor, other: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    """factor * images + (1 - factor) * other, within 0 .. 255; float32."""
    mixed = images.to(torch.float32).mul(factor)
    if not isinstance(other, float) or other:
        mixed = mixed.add_((1 - factor) * other)
    return mixed.clamp_(0, 255)


def luma(images: torch.Tensor) -> torch.Tensor:
    """(g, H, W, 1) float32: gray as torchvision computes it (ITU-R 601: .2989, .587, .114)."""
    images = images.to(torch.float32)
    return (images[..., :1] * 0.2989).add_(images[..., 1:2] * 0.587).add_(images[..., 2:] * 0.114)


def mean_of(gray: torch.Tensor) -> torch.Tensor:
    """(g, 1, 1, 1) float32: the mean of (g, H, W, 1) values in steps of 1/256. A sum of integers has no order."""
    total = gray.mul(256).to(torch.int64).sum(dim=(1, 2, 3), keepdim=True).to(torch.float64)
    return (total / (256 * gray.shape[1] * gray.shape[2])).to(torch.float32)


def _brightness(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    return blend(images, 0.0, column_of(1 + s, images)).to(torch.uint8)


def _contrast(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    return blend(images, mean_of(luma(images).floor_()), column_of(1 + s, images)).to(torch.uint8)


def _color(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    return blend(images, luma(images).floor_(), column_of(1 + s, images)).to(torch.uint8)


def _sharpness(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    """Blends with a 3x3 blur (weights 1, in the middle 5); the outermost pixels stay."""
    if min(images.shape[1:3]) < 3:
        return images
    x = images.to(torch.int32)
    high, wide = x.shape[1], x.shape[2]
    rows = x[:, : high - 2] + x[:, 1 : high - 1] + x[:, 2:]
    total = rows[:, :, : wide - 2] + rows[:, :, 1 : wide - 1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    blurred = images.clone()
    blurred[:, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)  # rounded
    return blend(images, blurred.to(torch.float32), column_of(1 + s, images)).to(torch.uint8)


def _posterize(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    """Keeps 8 - 6 * |strength| of the 8 bits."""
    bits = 8 - np.rint(np.abs(s) * 6).astype(np.int64)
    mask = (256 - 2 ** (8 - bits)).astype(np.uint8)
    return images & to_device(mask, images.device)[:, None, None, None]


def _solarize(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    """Inverts what is at least as bright as 255 * (1 - |strength|)."""
    threshold = column_of(255 * (1 - np.abs(s)), images)
    return torch.where(images >= threshold, 255 - images, images)


def _autocontrast(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    """Stretches each channel to 0 .. 255; a channel of one value stays."""
    low, high = images.amin(dim=(1, 2), keepdim=True), images.amax(dim=(1, 2), keepdim=True)
    flat = high == low
    scale = 255 / (high.to(torch.float32) - low.to(torch.float32)).masked_fill_(flat, 255)
    return ((images - low.masked_fill(flat, 0)).to(torch.float32) * scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: torch.Tensor, s: Strengths) -> torch.Tensor:
    """Flattens the histogram of each channel, as Pillow's ImageOps.equalize does."""
    g, height, width, channels = images.shape
    planes = images.permute(0, 3, 1, 2).reshape(g * channels, -1).to(torch.int64)
    with in_any_order():
        histogram = planes.new_zeros((g * channels, 256)).scatter_add_(1, planes, torch.ones_like(planes))
    brightest = histogram.gather(1, planes.amax(dim=1, keepdim=True))  # pixels of the brightest value that occurs
    step = (height * width - brightest) // 255  # (g * C, 1)
    before = torch.cumsum(histogram, 1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=planes.device), table)
    return table.gather(1, planes).to(torch.uint8).view(g, channels, height, width).permute(0, 2, 3, 1)


Operation = Callable[[torch.Tensor, Strengths], torch.Tensor]
# (name, what it does to (g, H, W, 3) uint8 images, the largest strength); the order is part of the draws
OPERATIONS: tuple[tuple[str, Operation | None, float], ...] = (
    ("Identity", None, 0.0),
    ("ShearX", _shear_x, 0.99),
    ("ShearY", _shear_y, 0.99),
    ("TranslateX", _translate_x, 32.0),
    ("TranslateY", _translate_y, 32.0),
    ("Rotate", _rotate, 135.0),
    ("Brightness", _brightness, 0.99),
    ("Color", _color, 0.99),
    ("Contrast", _contrast, 0.99),
    ("Sharpness", _sharpness, 0.99),
    ("Posterize", _posterize, 1.0),
    ("Solarize", _solarize, 1.0),
    ("AutoContrast", _autocontrast, 0.0),
    ("Equalize", _equalize, 0.0),
)
