"""Durations come from clocks that never jump (a run under one that does: faults/test_clock.py)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

WALL = {"time.time", "time.time_ns", "time.clock_gettime", "datetime.now", "datetime.utcnow", "datetime.today"}
# Where the time of day is what is wanted, and why.
ALLOWED = {
    "heartbeat.py": "the age of a file that another machine wrote: there is no clock in common but that one",
    "status.py": "how long ago other machines wrote their files, for a person to read",
    "sessions.py": "when a start was, beside starts on other machines and days, for a person to read",
    "times.py": "when each rank, on machines of their own, wrote its times: which start was the last",
    "gather.py": "until now, of a run whose start was written down on another machine",
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
