"""A training step reads nothing back: on a GPU the host would stand still until all work so far is done.

Seen on a CPU, where reading costs nothing and is found by the operations that do it. What CUDA itself says of it is in
gpu/test_step.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from distcnn import train as training
from distcnn.job import Job
from distcnn.world import World
from tests.harness import small_config

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item(), float(), int(), bool()
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class NothingRead(TorchDispatchMode):
    """Fails at whatever makes the host wait for a value, or for how many there are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} reads a value"
        if func in INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} with a mask counts it first"
        return func(*args, **(kwargs or {}))


class Unread:
    """Flags as a GPU's process sees them: those of this step are not there yet."""

    def read(self, values: torch.Tensor) -> list[float]:
        return [0.0] * len(values)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state for a process, with the precision that was asked for first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def steps_made(monkeypatch: pytest.MonkeyPatch, data: Path, output: Path, **values: Any) -> int:
    """How many steps of a run were made without a read; its first one, which sets up what it needs, may read."""
    step, made = training.train_step, 0

    def watched(*arguments: Any) -> Any:
        nonlocal made
        if arguments[0].position.total == 0:
            return step(*arguments)
        with NothingRead(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("tolist() reads values"))
            result = step(*arguments)
        made += 1
        return result

    def unread(job: Job) -> None:
        job.flags = Unread()  # type: ignore[assignment]

    monkeypatch.setattr(training, "train_step", watched)
    training.train(small_config(data, output, epochs=1, **values), World(), unread)
    return made


@pytest.mark.parametrize(
    "values",
    [
        {"augment": ["trivial-augment", "color-jitter=0.4", "erasing=0.5", "cutout=4"]},
        {"optimizer": "sgd", "mixed_precision": "bf16", "loss": "bce", "balance": "sqrt"},
        {"optimizer": "lamb", "reduction": "ddp", "layer_decay": 0.9},
        {"optimizer": "muon", "model": "resnet9", "channels": [4, 6, 8, 8], "batch_norm": "sync"},
    ],
    ids=lambda values: next(iter(values.values())) if "optimizer" in values else "adamw",
)
def test_nothing_is_read_in_a_step(
    values: dict[str, Any], stripes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the three steps has samples for three of the eight tiles only."""
    assert steps_made(monkeypatch, stripes_set, tmp_path / "run", **values) == 2


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.item, lambda loss: loss.tolist(), torch.nonzero])
def test_a_read_is_seen(read: Any, stripes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = training.loss_sum

    def reads(*arguments: Any) -> torch.Tensor:
        total = loss(*arguments)
        read(total.detach())
        return total

    monkeypatch.setattr(training, "loss_sum", reads)
    with pytest.raises((AssertionError, pytest.fail.Exception), match="read"):
        steps_made(monkeypatch, stripes_set, tmp_path / "run")
