"""A training step makes the host wait for nothing: CUDA itself refuses to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distcnn import train as training
from tests.gpu.support import PRECISIONS, run


@pytest.fixture
def forbid() -> Iterator[Any]:
    """Says from when on, and until when, a call that synchronises is an error."""

    def set_mode(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it calls itself a prototype
            torch.cuda.set_sync_debug_mode(mode)

    yield set_mode
    set_mode("default")


@pytest.mark.parametrize(
    "values",
    [
        *({"mixed_precision": precision} for precision in PRECISIONS),
        {"augment": ["trivial-augment", "color-jitter=0.4", "erasing=0.5", "cutout=4"], "crop": "translate"},
        {"reduction": "ddp", "optimizer": "sgd", "balance": "sqrt"},
        {"loss": "bce", "balance": "sqrt", "batch_norm": "sync"},
        {"optimizer": "lamb", "layer_decay": 0.9},
        {"model": "resnet9", "channels": [8, 8, 16, 16], "optimizer": "muon"},
        {"model": "resnet18", "optimizer": "sgd", "mixed_precision": "fp16"},
    ],
    ids=str,
)
def test_no_step_synchronises(
    values: dict[str, Any], forbid: Any, stripes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first, which sets up libraries and memory."""
    step, made = training.train_step, []

    def watched(job: Any, *others: Any) -> Any:
        if job.position.total:
            forbid("error")
        result = step(job, *others)
        forbid("default")
        made.append(job.position.total)
        return result

    monkeypatch.setattr(training, "train_step", watched)
    run(stripes_set, tmp_path / "run", **values)
    assert made == list(range(6))


def test_a_read_is_seen(forbid: Any, stripes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = training.loss_sum

    def reads(*given: Any) -> torch.Tensor:
        forbid("error")
        total = loss(*given)
        float(total.detach())
        return total

    monkeypatch.setattr(training, "loss_sum", reads)
    with pytest.raises(RuntimeError, match="synchroniz"):
        run(stripes_set, tmp_path / "run")
