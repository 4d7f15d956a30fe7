"""JPEG files decoded, cut and scaled on the GPU: by NVIDIA's nvJPEG, which torchvision calls, and torch's kernels.

Files travel encoded, a tenth of the pixels' bytes, and the host's threads only read. What is no JPEG file that nvJPEG
takes (PNG, WebP, CMYK) is decoded on the host as ever. The pixels differ from those of the CPU's decoder by a little
(another inverse transform, another interpolation of colours, scaling in floats), and a damaged file may give pixels
where that one finds the damage: it is another run. With device = cpu libjpeg-turbo stands in for nvJPEG in all of it.

n samples, S pixels a side, C = 3 channels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate

from distcnn.data.decode import DecodeError, Pixels, decode
from distcnn.data.fill import Filled, Filler
from distcnn.data.loader import Loader
from distcnn.data.order import Ids
from distcnn.data.readers import Reader
from distcnn.data.shards import Found
from distcnn.data.upload import HostBuffer
from distcnn.data.views import View, reduction
from distcnn.errors import UserError

_clock = time.perf_counter


@dataclass
class FilledOnDevice(Filled):
    """What was filled lies on the device, and is there for other streams from the event `ready` on."""

    images: torch.Tensor | None = None  # (n, S, S, 3) uint8
    ready: Any = None


class _Stream(threading.local):
    """A thread's own stream. Memory that it frees goes to nobody else, so its own work alone can still be using it."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        self.streams: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self.stream: Any = self.streams.Stream()


class DeviceFiller(Filler):
    """A Filler that makes views of samples on `device`. Safe to use from many threads."""

    def __init__(self, reader: Reader, seed: int, device: torch.device) -> None:
        super().__init__(reader, seed, None, reduce=True)
        self.device = device
        self._own = _Stream(device)

    def make(self, ids: Ids, found: Found, epoch: int, view: View) -> FilledOnDevice:
        """This view of the samples `ids`, which lie where `found` says. The thread waits for the decoder."""
        own = self._own
        filled = FilledOnDevice(len(ids))
        begun = _clock()
        sources = self._read(ids, found, None)
        filled.read_seconds = _clock() - begun
        shapes = self._shapes(ids, found, sources)
        boxes = _boxes(view, ids, shapes, self.seed, epoch)
        # torchvision hands the decoder memory of this stream, but lets it write on one of its own at once.
        if own.streams is torch.cuda:
            own.stream.synchronize()
        with own.streams.stream(own.stream):
            decoded = self._decode(sources)
            filled.decode_seconds = _clock() - begun - filled.read_seconds
            cut = []
            for place, (image_CHW, box) in enumerate(zip(decoded, boxes, strict=True)):
                if isinstance(image_CHW, str):
                    self._give_up(int(ids[place]), place, np.empty(0, dtype=np.uint8), image_CHW, filled)
                    image_CHW = torch.zeros((3, 1, 1), dtype=torch.uint8, device=self.device)
                    box = (0, 0, 1, 1)
                cut.append(cut_and_scaled(image_CHW, box, view.size))
            filled.images = _packed(cut, view.size, self.device)
            filled.ready = own.streams.Event()
            filled.ready.record(own.stream)
        filled.resize_seconds = _clock() - begun - filled.read_seconds - filled.decode_seconds
        return filled

    def _decode(self, sources: Sequence[bytes | Pixels | str]) -> list[torch.Tensor | str]:
        """(3, H, W) uint8 on the device of each source, or what is wrong with it."""
        decoded: list[torch.Tensor | str] = [self._moved(s) if isinstance(s, np.ndarray) else "" for s in sources]
        encoded = {place: source for place, source in enumerate(sources) if isinstance(source, bytes)}
        for place, image in zip(encoded, self._decode_jpegs(list(encoded.values())), strict=True):
            decoded[place] = image
        for place, source in enumerate(sources):
            if isinstance(source, str):
                decoded[place] = source
        return decoded

    def _decode_jpegs(self, files: list[bytes]) -> list[torch.Tensor | str]:
        """All at once; where one of them is refused, one by one, and those that are refused alone on the host."""
        if not files:
            return []
        if (images := _decoded(files, self.device)) is not None:
            return list(images)
        alone = [(_decoded([data], self.device), data) for data in files]
        return [found[0] if found else self._decode_here(data) for found, data in alone]

    def _decode_here(self, data: bytes) -> torch.Tensor | str:
        """(3, H, W) uint8 by the host's decoders, or what is wrong."""
        try:
            return self._moved(decode(data))
        except DecodeError as error:
            return str(error)

    def _moved(self, pixels: Pixels) -> torch.Tensor:
        """(3, H, W) uint8 on the device, of (H, W, 3)."""
        return torch.from_numpy(np.array(pixels)).to(self.device).permute(2, 0, 1)


class NvjpegLoader(Loader):
    """A Loader whose images are decoded on its device, a step in one go. It keeps no pixels in memory."""

    _on_host = False

    def __init__(
        self, reader: Reader, view: View, seed: int, threads: int, prefetch: int, device: torch.device
    ) -> None:
        super().__init__(reader, view, seed, threads, prefetch, device=device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # threads have no current device of their own
        self._maker = DeviceFiller(reader, seed, device)

    def _begin_filling(
        self, ids: Ids, found: Found, buffer: HostBuffer, epoch: int, view: View
    ) -> Sequence[Future[Filled] | Filled]:
        if self._pool is None:
            return [self._maker.make(ids, found, epoch, view)]
        return [self._pool.submit(self._maker.make, ids, found, epoch, view)]

    def _send(self, buffer: HostBuffer, chunks: Sequence[Filled], *others: torch.Tensor) -> list[torch.Tensor]:
        (made,) = chunks
        assert isinstance(made, FilledOnDevice) and made.images is not None
        _, *sent = self._upload.send(buffer, *others)
        self._upload.receive([made.images], made.ready)
        return [made.images, *sent]


def cut_and_scaled(image_CHW: torch.Tensor, box: Sequence[int], size: int) -> torch.Tensor:
    """(1, C, S, S) float32: the `box` (top, left, height, width) of (C, H, W) uint8, bilinear with antialias.

    What is much larger is first averaged over squares, as the CPU's decoder does in the cosine domain.
    """
    top, left, height, width = box
    x_1CHW = image_CHW[None, :, top : top + height, left : left + width].to(torch.float32)
    factor = reduction(box, size)
    if factor > 1:
        x_1CHW = avg_pool2d(x_1CHW, factor)
    if x_1CHW.shape[2:] == (size, size):
        return x_1CHW
    return interpolate(x_1CHW, (size, size), mode="bilinear", antialias=True)


def _packed(cut: Sequence[torch.Tensor], size: int, device: torch.device) -> torch.Tensor:
    """(n, S, S, C) uint8 of n images (1, C, S, S) float32."""
    if not cut:
        return torch.empty((0, size, size, 3), dtype=torch.uint8, device=device)
    return torch.cat(list(cut)).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _boxes(view: View, ids: Ids, shapes: Sequence[tuple[int, int]], seed: int, epoch: int) -> list[Sequence[int]]:
    """What is cut out of each image; all of it where the view is of whole images."""
    if view.kind == "none":
        return [(0, 0, height, width) for height, width in shapes]
    heights_widths = np.array(shapes, dtype=np.int64).reshape(-1, 2)
    boxes: list[Sequence[int]] = view.boxes(ids, heights_widths[:, 0], heights_widths[:, 1], seed, epoch).tolist()
    return boxes


def _decoded(files: list[bytes], device: torch.device) -> list[torch.Tensor] | None:
    """(3, H, W) uint8 RGB of each JPEG file; None if one of them is refused."""
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    try:
        images: list[torch.Tensor] = decode_jpeg(encoded, ImageReadMode.RGB, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return images


def check_decoder(device: torch.device) -> None:
    """Raises UserError where --decode nvjpeg cannot be had: without a GPU, or with a torchvision built without it."""
    if device.type != "cuda":
        raise UserError("--decode nvjpeg needs a GPU, and this run has none: leave it out (the CPU decodes as well)")
    from torchvision.io import encode_jpeg

    one = encode_jpeg(torch.zeros((3, 16, 16), dtype=torch.uint8)).numpy().tobytes()
    if _decoded([one], device) is None:
        raise UserError("--decode nvjpeg: this torchvision is built without nvJPEG (that of PyPI has it): leave it out")
