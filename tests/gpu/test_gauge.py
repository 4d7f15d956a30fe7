"""What is read off a real GPU, without waiting for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distcnn.gauge import peak_flops
from distcnn.runfolder import METRICS, read_rows
from tests.gpu.support import run


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rows_have_memory_and_where_the_peak_is_known_mfu(precision: str, stripes_set: Path, tmp_path: Path) -> None:
    run(stripes_set, tmp_path / "run", mixed_precision=precision)
    rows = [row for row in read_rows(tmp_path / "run" / METRICS) if "train/loss" in row]
    used, held = ([row[f"perf/gpu_{kind}_bytes"] for row in rows] for kind in ("memory", "reserved"))
    assert used == sorted(used) and 0 < used[-1] <= held[-1] <= torch.cuda.get_device_properties(0).total_memory
    known = peak_flops(torch.cuda.get_device_name(), "bf16" if precision == "bf16" else "tf32")
    assert all(("perf/mfu" in row) == bool(known) for row in rows)
    assert all(0 < row.get("perf/mfu", 0.5) < 1 for row in rows)
