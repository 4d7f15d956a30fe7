"""Row 24: durations come from clocks that never jump."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from distcnn.runfolder import read_rows
from tests.faults.ranks import finish
from tests.faults.runs import flags, results
from tests.support import ROOT

WALL = {"time.time", "time.time_ns", "time.clock_gettime", "datetime.now", "datetime.utcnow", "datetime.today"}
# Where the time of day is what is wanted, and why.
ALLOWED = {
    "heartbeat.py": "the age of a file that another machine wrote: there is no clock in common but that one",
    "status.py": "how long ago other machines wrote their files, for a person to read",
    "doctor.py": "the clock of this machine against the file server's",
}
PACKAGE = ROOT / "distcnn"


def wall_clocks(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, name) of every use of a clock that people set."""
    names = [(node.lineno, ast.unparse(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [
        (node.lineno, f"{node.module}.{alias.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return [(line, name) for line, name in names if any(name == wall or name.endswith(f".{wall}") for wall in WALL)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_durations_are_monotonic(path: Path) -> None:
    found = wall_clocks(ast.parse(path.read_text()))
    assert not found or path.name in ALLOWED, f"{path}: {found}: time.monotonic or time.perf_counter, or a reason"


def test_the_walk_sees_what_it_should() -> None:
    code = "import time\nx = time.time()\ny = datetime.datetime.now()\nfrom time import time\nz = time.monotonic"
    assert [name for _, name in wall_clocks(ast.parse(code))] == ["time.time", "datetime.datetime.now", "time.time"]


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
