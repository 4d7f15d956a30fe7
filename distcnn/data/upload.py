"""From the host to the device: pinned buffers, copied on a stream of their own while the device computes.

Decode threads fill one buffer of a ring after another. Sending one starts the copy on the side stream, and the stream
that computes waits for it; the host waits for nothing, but for a buffer that is to be filled again while its copy is
still under way. On a CPU the same lines run with torch's streams and events that do nothing, and nothing is copied:
what is sent is the buffer itself.

n samples, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from distcnn.data.decode import ALIGNED, Pixels, offset
from distcnn.data.shared import Address, SharedMemory

CPU = torch.device("cpu")


class HostBuffer:
    """Host memory for the images of one step after another, and the event of its last copy to the device."""

    def __init__(self, pinned: bool, copied: Any, shared: bool = False) -> None:
        self._pinned, self.copied = pinned, copied
        self._memory = torch.empty((0, 0, 0, 3), dtype=torch.uint8)
        self._shared = SharedMemory(0) if shared else None
        self.images = self._memory  # (n, S, S, 3) uint8: the part that the step uses
        self.pixels: Pixels = self.images.numpy()  # the same memory, for the threads that fill it

    @property
    def address(self) -> Address:
        """Where other processes find `images`, if it was made for that."""
        assert self._shared is not None
        return self._shared.address

    def resize(self, samples: int, side: int) -> None:
        """Make `images` (samples, side, side, 3). Its memory may be new: nothing may be under way to or from it."""
        if len(self._memory) < samples or self._memory.shape[1] != side:
            self._memory = self._allocated((samples, side, side, 3))
        self.images = self._memory[:samples]
        self.pixels = self.images.numpy()

    def _allocated(self, shape: tuple[int, ...]) -> torch.Tensor:
        values = math.prod(shape)
        if self._shared is None:
            whole = torch.empty(values + ALIGNED - 1, dtype=torch.uint8, pin_memory=self._pinned)
            start = offset(whole.data_ptr())
            return whole[start : start + values].view(shape)
        self._shared = SharedMemory(values)
        if self._pinned:
            self._shared.pin()
        return torch.from_numpy(self._shared.pixels).view(shape)


class Upload:
    """The ring of `slots` buffers and the side stream of one loader. Used by the thread that asks for steps.

    shared: other processes fill the buffers.
    """

    def __init__(self, device: torch.device, slots: int, shared: bool = False) -> None:
        self.device = device
        self._gpu = device.type == "cuda"
        self._streams: Any = torch.cuda if self._gpu else torch.cpu
        self._side = torch.cuda.Stream(device) if self._gpu else torch.cpu.Stream()  # type: ignore[no-untyped-call]
        self._ring = [HostBuffer(self._gpu, self._streams.Event(), shared) for _ in range(slots)]
        self._turn = 0

    def buffer(self, samples: int, side: int) -> HostBuffer:
        """The ring's next buffer, as large as asked for. Waits until its last copy is done."""
        buffer = self._ring[self._turn % len(self._ring)]
        self._turn += 1
        buffer.copied.synchronize()
        buffer.resize(samples, side)
        return buffer

    def send(self, buffer: HostBuffer, *others: torch.Tensor) -> list[torch.Tensor]:
        """The buffer's images and the `others` on the device, for the stream that is current here."""
        parts = [buffer.images, *(part.pin_memory() if self._gpu else part for part in others)]
        with self._streams.stream(self._side):
            sent = [part.to(self.device, non_blocking=True) for part in parts]
            buffer.copied.record(self._side)
        self.receive(sent, buffer.copied)
        return sent

    def receive(self, made: Iterable[torch.Tensor], ready: Any) -> None:
        """Let the stream that is current here wait for the event `ready`, at which another stream has `made` these."""
        computing = self._streams.current_stream(self.device)
        computing.wait_event(ready)
        if self._gpu:
            for tensor in made:  # its memory is the other stream's: not to be given away while it is computed with
                tensor.record_stream(computing)
