"""What needs a GPU. Where torch sees none, all of it is left out; with REQUIRE_GPU=1 (benchmarks/gpu.sh) it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from distcnn.config import TrainConfig
from distcnn.job import Job
from distcnn.runfolder import METRICS, read_rows
from distcnn.train import train
from distcnn.world import World
from tests.harness import Trace, small_config, trace_of
from tests.test_train import Crash, crash_at

if not torch.cuda.is_available():
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("torch sees no GPU here, and REQUIRE_GPU=1", pytrace=False)
    pytest.skip("torch sees no GPU here", allow_module_level=True)

DEVICE = "cuda"
PRECISIONS = ("no", "bf16", "fp16")


def gpu_config(data: Path, output: Path, **values: Any) -> TrainConfig:
    """The small run of the other tests, on a GPU."""
    return small_config(data, output, **{"device": DEVICE, **values})


def begin(config: TrainConfig, watch: Callable[[Job], None] | None = None) -> None:
    """Train in a process that knows of no other device or precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config, World(), watch)


def begin_and_die(config: TrainConfig, step: int) -> None:
    """Train until step number `step` (from 1), in the middle of which the process ends."""
    with contextlib.suppress(Crash):
        begin(config, crash_at(step))


def run(data: Path, output: Path, **values: Any) -> Trace:
    """The trace of a whole run on a GPU."""
    begin(gpu_config(data, output, **values))
    return trace_of(output)


def losses(folder: Path) -> list[float]:
    """The training loss of each step."""
    return [row["train/loss"] for row in read_rows(folder / METRICS) if "train/loss" in row]
