"""Row 24: a wall clock that jumps. That durations do not come from one: tests/test_clocks.py."""

from __future__ import annotations

from pathlib import Path

from distcnn.runfolder import read_rows
from tests.faults.ranks import finish
from tests.faults.runs import flags, results


def test_a_clock_that_jumps_changes_nothing(images: Path, tmp_path: Path) -> None:
    """An hour back at every second look: speeds, limits and stalls do not mind."""
    run = tmp_path / "run"
    words = flags(
        images, run, "--epochs", "1", "--time-limit", "30", "--stall-timeout", "20", "--checkpoint-minutes", "9"
    )
    assert finish(tmp_path / "a", 2, words, faults={-1: [("jumping_clock", {})]}) == [0, 0]
    assert 0 < results(run)["wall_seconds"] < 300 and results(run)["images_per_second"] > 0
    rows = [row for row in read_rows(run / "metrics.jsonl") if "perf/images_per_second" in row]
    assert all(row["perf/images_per_second"] > 0 and 0 <= row["perf/wait_share"] <= 1 for row in rows)
