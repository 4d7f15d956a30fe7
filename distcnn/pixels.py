"""Batched kernels on pixels, for any device: crop, mirror, normalise, fill. N samples, H W pixels, C = 3 channels.

Every value is computed by single, exactly rounded operations, so that a sample's pixels do not depend on the batch
that it came in, on its place there, on the number of threads, or on what computed it: torch, or a kernel of Numba's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distcnn import compiled
from distcnn.compiled import Kernel
from distcnn.data import keyed
from distcnn.data.order import Ids

CHUNK_VALUES = 1 << 18  # on a CPU, work through a batch in parts that stay in the processor's cache


@dataclass(frozen=True)
class Window:
    """What is cut out of images padded by `padding` pixels: S x S at (top, left), each (n,) int64 of 0 .. 2 * padding.

    The border is black or (`reflect`) mirrors the image; then padding < S.
    """

    top: Ids
    left: Ids
    padding: int
    reflect: bool = False


def crop_padded(images_NHWC: torch.Tensor, window: Window) -> torch.Tensor:
    """(n, S, S, 3) uint8: the window of each image. One gather of whole windows: as cheap as a copy of the images."""
    padding = window.padding
    n, side = images_NHWC.shape[:2]
    wide = side + 2 * padding
    padded = images_NHWC.new_zeros((n, wide, wide, 3))
    inner = slice(padding, padding + side)
    padded[:, inner, inner] = images_NHWC
    if window.reflect and padding:
        padded[:, inner, :padding] = images_NHWC[:, :, 1 : padding + 1].flip(2)
        padded[:, inner, padding + side :] = images_NHWC[:, :, side - 1 - padding : side - 1].flip(2)
        padded[:, :padding] = padded[:, padding + 1 : 2 * padding + 1].flip(1)
        padded[:, padding + side :] = padded[:, side - 1 : padding + side - 1].flip(1)
    # Every window of the batch, laid over the same memory: n * wide * wide - ... possible corners, S rows, S * 3 values
    corners = n * wide * wide - (side - 1) * wide - side + 1
    windows = padded.view(-1).as_strided((corners, side, side * 3), (3, wide * 3, 1))
    corner = np.arange(n) * (wide * wide) + window.top * wide + window.left
    return windows.index_select(0, to_device(corner, images_NHWC.device)).view(n, side, side, 3)


def mirrored(images_NHWC: torch.Tensor, flipped: NDArray[np.bool_] | None) -> torch.Tensor:
    """(n, H, W, 3): a copy in which the images marked in `flipped` (n,) are mirrored; the images where none is."""
    if flipped is None or not flipped.any():
        return images_NHWC
    if flipped.all():
        return _turned(images_NHWC)
    out = images_NHWC.clone()
    which = np.flatnonzero(flipped)
    step = _chunk(images_NHWC)
    for start in range(0, len(which), step):
        some = which[start : start + step]
        put_(out, some, _turned(images_NHWC.index_select(0, to_device(some, images_NHWC.device))))
    return out


def _turned(images_NHWC: torch.Tensor) -> torch.Tensor:
    """All of them mirrored. N H W C -> N C H W in channels_last, for which torch has a vectorised flip of bytes."""
    return images_NHWC.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)


def put_(images: torch.Tensor, which: Ids, values: torch.Tensor) -> None:
    """images[which] = values, in place; `images` contiguous."""
    if images.device.type == "cpu" and len(which):
        # torch's index_copy_ goes byte by byte: 14 to 35 times slower than NumPy, which copies whole images
        images.view(len(images), -1).numpy()[which] = values.reshape(len(which), -1).numpy()
    elif len(which):
        _put_by_choosing_(images, which, values)


def _put_by_choosing_(images: torch.Tensor, which: Ids, values: torch.Tensor) -> None:
    """The same on a GPU, where index_copy_ makes the host wait if only deterministic kernels are allowed."""
    place, among = np.zeros(len(images), dtype=np.int64), np.zeros(len(images), dtype=np.bool_)
    place[which], among[which] = np.arange(len(which)), True
    spread = values.index_select(0, to_device(place, images.device))
    chosen = to_device(among, images.device).view(-1, *[1] * (images.ndim - 1))
    images.copy_(torch.where(chosen, spread, images))


def normalise(
    images_NHWC: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    flipped: NDArray[np.bool_] | None = None,
    window: Window | None = None,
) -> torch.Tensor:
    """(n, 3, H, W) float32 in channels_last from (n, H, W, 3) values of 0 .. 255: (x / 255 - mean) / std.

    On the way, while an image is in the processor's cache, `window` is cut out of it (uint8 only, H = W), and what
    comes of it is mirrored where `flipped` (n,) says so.
    """
    n, height, width = images_NHWC.shape[:3]
    # For a whole row of pixels: an inner loop over 3 values would be slow.
    shift = np.tile(np.array([255 * m for m in mean], dtype=np.float32), width)
    scale = np.tile(np.array([1 / (255 * s) for s in std], dtype=np.float32), width)
    on_host = images_NHWC.device.type == "cpu" and images_NHWC.dtype == torch.uint8 and images_NHWC.is_contiguous()
    if on_host and height == width and n and (finish := finish_kernel()):
        out = torch.empty(images_NHWC.shape, dtype=torch.float32)
        none = np.zeros(n, dtype=np.int64)
        top, left = (none, none) if window is None else (window.top - window.padding, window.left - window.padding)
        turned = np.zeros(n, dtype=np.bool_) if flipped is None else flipped
        finish(images_NHWC.numpy(), top, left, bool(window and window.reflect), turned, shift, scale, out.numpy())
        return out.permute(0, 3, 1, 2)
    if window is not None:
        images_NHWC = crop_padded(images_NHWC, window)
    return _normalise_by_torch(images_NHWC, shift, scale, flipped)


def _normalise_by_torch(
    images_NHWC: torch.Tensor,
    shift: NDArray[np.float32],
    scale: NDArray[np.float32],
    flipped: NDArray[np.bool_] | None,
) -> torch.Tensor:
    n, height, width, channels = images_NHWC.shape
    device = images_NHWC.device
    shift_W, scale_W = to_device(shift, device), to_device(scale, device)
    out = torch.empty((n, height, width * channels), dtype=torch.float32, device=device)
    step = _chunk(images_NHWC)
    for start in range(0, n, step):
        some = slice(start, start + step)
        part = mirrored(images_NHWC[some], None if flipped is None else flipped[some])
        out[some].copy_(part.reshape(-1, height, width * channels)).sub_(shift_W).mul_(scale_W)
    return out.view(n, height, width, channels).permute(0, 3, 1, 2)


def _finish_is_exact(finish: Kernel) -> bool:
    n, side = 9, 7
    values = keyed.words(np.arange(n * side * side * 3), 0, 0, 0)
    images = torch.from_numpy(values.astype(np.uint8)).view(n, side, side, 3)
    shift, scale = ((values[: side * 3] % 1009).astype(np.float32) / np.float32(divisor) for divisor in (3, 70))
    flipped = np.arange(n) % 2 == 1
    out = torch.empty(images.shape, dtype=torch.float32)
    for padding, reflect in ((0, False), (3, False), (2, True)):
        window = Window(np.arange(n) % (2 * padding + 1), np.arange(n) // 2 % (2 * padding + 1), padding, reflect)
        corner = window.top - padding, window.left - padding
        finish(images.numpy(), *corner, reflect, flipped, shift, scale, out.numpy())
        expected = _normalise_by_torch(crop_padded(images, window), shift, scale, flipped)
        if not torch.equal(out.permute(0, 3, 1, 2), expected):
            return False
    return True


finish_kernel = compiled.kernel(lambda kernels: (kernels.finish, kernels.FINISH), _finish_is_exact)


def fill_boxes_(x_NCHW: torch.Tensor, boxes: NDArray[np.int64], value: float) -> None:
    """Set a box of each image to `value`, in place. boxes (n, 4): top, left, height, width; height 0 = none."""
    if x_NCHW.device.type == "cpu":
        for image_CHW, (top, left, height, width) in zip(x_NCHW, boxes.tolist(), strict=True):
            if height:
                image_CHW[:, top : top + height, left : left + width] = value
        return
    rows, columns = np.arange(x_NCHW.shape[2]), np.arange(x_NCHW.shape[3])
    in_rows = (rows >= boxes[:, :1]) & (rows < boxes[:, :1] + boxes[:, 2:3])  # (n, H)
    in_columns = (columns >= boxes[:, 1:2]) & (columns < boxes[:, 1:2] + boxes[:, 3:4])  # (n, W)
    inside = (
        to_device(in_rows, x_NCHW.device)[:, None, :, None] & to_device(in_columns, x_NCHW.device)[:, None, None, :]
    )
    x_NCHW.masked_fill_(inside, value)


def _chunk(images: torch.Tensor) -> int:
    """How many images to work on at once."""
    if images.device.type != "cpu":
        return max(len(images), 1)
    return max(CHUNK_VALUES // max(images[:1].numel(), 1), 1)


def to_device(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> torch.Tensor:
    """A numpy array on a device, by way of pinned memory: the host does not wait for what the device is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
