"""The proof at more length, left out unless asked for: `pytest -m long tests/verify`. Some minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distcnn.verify.evidence import disagreement
from distcnn.verify.launch import Trace
from tests.support import make_stripes
from tests.verify.runs import make_run, run_many
from tests.verify.test_proof import RESNET, base_config, ending

LONG: dict[str, Any] = RESNET | {"global_batch_size": 32, "tile_size": 4, "epochs": 4, "cutmix": 0.5}
TWELVE: dict[str, Any] = LONG | {"global_batch_size": 48, "epochs": 2}  # 12 lanes, for 3 processes


@pytest.mark.long
def test_a_resnet18_at_32_px(tmp_path: Path) -> None:
    """24 steps at 1, 2, 4 and 8 processes; 12 lanes on 3 processes."""
    base = base_config(make_stripes(tmp_path / "stripes", 180, 60, side=32))
    plan = {
        size: [(make_run(tmp_path, f"{size}", size, base, **LONG), {})]
        + [(make_run(tmp_path, f"twelve-{size}", size, base, **TWELVE), {})] * (size in (1, 3))
        for size in (1, 2, 4, 8)
    }
    plan[3] = [(make_run(tmp_path, "twelve-3", 3, base, **TWELVE), {})]
    traces: dict[str, Trace] = run_many(tmp_path / "lists", plan)
    one = ending(traces["1"])
    assert len({loss for _, loss, _, _ in one["losses"]}) == 24
    for size in (2, 4, 8):
        assert ending(traces[str(size)]) == one, size
        assert disagreement(traces[str(size)], "state", "weights") == ""
    assert ending(traces["twelve-3"]) == ending(traces["twelve-1"])
