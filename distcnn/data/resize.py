"""Boxes of images scaled to the model's square. Bilinear with antialias, uint8 to uint8. Runs in loader threads.

torch's kernel for uint8 writes straight into a slot: of those that average where they scale down it is the fastest
(benchmarks/LOG.md). Where they scale up, Numba's takes half the time for the same bits, see `distcnn.compiled`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distcnn import compiled
from distcnn.compiled import Kernel
from distcnn.data import keyed
from distcnn.data.decode import ALIGNED, Pixels, decode_reduced, memory

GROUP_BYTES = 3 << 17  # of decoded images, scaled in one call: they stay in a core's cache, 8 of 128 px
SPILL = 4  # bytes after an image that the kernel may read
_resize = torch.ops.aten._upsample_bilinear2d_aa.out  # what F.interpolate(antialias=True) calls


def resize_into(slot: Pixels, pixels: Pixels, box: Sequence[int]) -> None:
    """Cut `box` (top, left, height, width) out of (H, W, 3) pixels and scale it into `slot` (S, S, 3), contiguous."""
    top, left, height, width = box
    cut_HWC = pixels[top : top + height, left : left + width]
    side = slot.shape[0]
    if height == side and width == side:
        slot[:] = cut_HWC
        return
    if not cut_HWC.flags.writeable:  # Pillow's pixels; torch warns of them
        cut_HWC = cut_HWC.copy()
    # 1 H W 3 -> 1 3 H W: the strides of channels_last take the vectorised path, given an output that has them too. By
    # numpy, since each call of torch lets another thread have the interpreter, and waits to get it back.
    cut_NCHW = torch.from_numpy(cut_HWC.transpose(2, 0, 1)[None])
    out_NCHW = torch.from_numpy(slot.transpose(2, 0, 1)[None])
    _resize(cut_NCHW, [side, side], False, None, None, out=out_NCHW)


class Group:
    """Images that lie in memory one after another, to be scaled together. Not for several threads.

    Calls of compiled code let another thread have the interpreter, and wait to get it back: few of them are better.
    """

    def __init__(self) -> None:
        self._memory = memory(0)
        self._end = 0
        self._rows: list[tuple[int, ...]] = []  # slot, start in memory, height, width, and the box

    def forget(self) -> None:
        """Begin anew."""
        self._rows, self._end = [], 0

    @property
    def full(self) -> bool:
        """Whether it is time to scale."""
        return self._end >= GROUP_BYTES

    def decode(self, slot: int, data: bytes, shape: tuple[int, int], factor: int, box: Sequence[int]) -> Pixels:
        """Add a JPEG file's image, see `decode_reduced`, and its box; (H, W, 3) uint8, valid until `scale_into`."""
        height, width = -(-shape[0] // factor), -(-shape[1] // factor)
        pixels = decode_reduced(data, shape, factor, self._room(height * width * 3))
        self._add(slot, pixels, box)
        return pixels

    def copy(self, slot: int, pixels: Pixels, box: Sequence[int]) -> None:
        """Add an image (H, W, 3) that is there already, and its box."""
        self._room(pixels.size)[:] = pixels.reshape(-1)
        self._add(slot, pixels, box)

    def _room(self, values: int) -> Pixels:
        need = self._end + values + SPILL
        if len(self._memory) < need:
            grown = memory(max(need + need // 4, 2 * GROUP_BYTES))
            grown[: self._end] = self._memory[: self._end]
            self._memory = grown
        return self._memory[self._end : self._end + values]

    def _add(self, slot: int, pixels: Pixels, box: Sequence[int]) -> None:
        self._rows.append((slot, self._end, pixels.shape[0], pixels.shape[1], *box))
        self._end += pixels.size + -pixels.size % ALIGNED  # the next one begins as far from a multiple of it

    def scale_into(self, slots: Pixels) -> None:
        """Scale the boxes into their slots of `slots` (n, S, S, 3), and begin anew."""
        rows = self._rows
        self.forget()
        side = slots.shape[1]
        upscale = upscale_kernel()
        if upscale and (up := [row for row in rows if row[6] <= side and row[7] <= side]):
            upscale(self._memory, np.array(up), slots)
            rows = [row for row in rows if row[6] > side or row[7] > side] if len(up) < len(rows) else []
        for slot, start, height, width, *box in rows:
            pixels = self._memory[start : start + height * width * 3].reshape(height, width, 3)
            resize_into(slots[slot], pixels, box)


def _upscale_is_exact(upscale: Kernel) -> bool:
    pixels = keyed.words(np.arange(16 * 19 * 3), 0, 0, 0).astype(np.uint8).reshape(16, 19, 3)
    boxes = [(0, size // 3, min(size, 16), 18 - size) for size in range(1, 18)] + [(15, 18, 1, 1)]
    slots = np.empty((2, len(boxes), 17, 17, 3), dtype=np.uint8)
    spilled = np.concatenate([pixels.reshape(-1), np.zeros(SPILL, dtype=np.uint8)])
    upscale(spilled, np.array([(slot, 0, 16, 19, *box) for slot, box in enumerate(boxes)]), slots[0])
    for slot, box in zip(slots[1], boxes, strict=True):
        resize_into(slot, pixels, box)
    return np.array_equal(slots[0], slots[1])


upscale_kernel = compiled.kernel(lambda kernels: (kernels.upscale, kernels.UPSCALE), _upscale_is_exact)
