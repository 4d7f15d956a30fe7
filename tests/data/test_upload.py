"""The way to the device, with the streams of a CPU, which do nothing, and with ones that write down what is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distcnn.data.upload import CPU, Upload


def test_buffers_take_turns_and_grow() -> None:
    upload = Upload(CPU, 2)
    first, second, third = (upload.buffer(3, side) for side in (4, 4, 4))
    assert third is first and first is not second, "a ring of two"
    assert first.pixels.shape == (3, 4, 4, 3) and first.pixels.ctypes.data == first.images.data_ptr()
    at = first.images.data_ptr()
    upload.buffer(1, 1)
    assert upload.buffer(2, 4).images.data_ptr() == at, "smaller: the same memory"
    upload.buffer(1, 1)
    assert upload.buffer(5, 4).pixels.shape == (5, 4, 4, 3)
    upload.buffer(1, 1)
    assert upload.buffer(2, 6).pixels.shape == (2, 6, 6, 3), "progressive sizes"
    upload.buffer(1, 1)
    assert upload.buffer(0, 6).images.shape == (0, 6, 6, 3), "a rank with nothing to do in a step"


def test_on_a_cpu_what_is_sent_is_the_buffer_itself() -> None:
    upload = Upload(CPU, 2)
    buffer = upload.buffer(2, 3)
    buffer.pixels[:] = 7
    labels = torch.tensor([1, 2])
    images, sent = upload.send(buffer, labels)
    assert images.data_ptr() == buffer.images.data_ptr() and bool((images == 7).all())
    assert sent.data_ptr() == labels.data_ptr()


def test_no_buffer_is_filled_before_its_copy_is_done_and_none_computed_with_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[tuple[str, int]] = []
    made: list[Any] = []

    class Event(torch.cpu.Event):
        def __init__(self) -> None:
            self.number = len(made)
            made.append(self)

        def record(self, stream: Any = None) -> None:
            said.append((f"copy on the {'side' if stream is side else 'wrong'} stream", self.number))

        def synchronize(self) -> None:
            said.append(("host waits", self.number))

    class Stream(torch.cpu.Stream):
        def wait_event(self, event: Any) -> None:
            said.append(("compute waits" if self is not side else "side waits", event.number))

    computing = Stream()
    monkeypatch.setattr(torch.cpu, "Event", Event)
    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device: computing)
    upload = Upload(CPU, 2)
    side = upload._side
    for _ in range(3):
        upload.send(upload.buffer(1, 1))
    assert said == [
        (what, number) for number in (0, 1, 0) for what in ("host waits", "copy on the side stream", "compute waits")
    ]
