"""logs/sessions.jsonl: when a run was started, where from, and how far it came, so that a page can say what was lost.

Two kinds of rows: "start", and "end", which the next start writes from the heartbeats and metrics of the one before: a
process that is killed writes nothing.
"""

from __future__ import annotations

import contextlib
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distcnn.heartbeat import path_of, read_all
from distcnn.runfolder import METRICS, append_row, read_rows

SESSIONS = "logs/sessions.jsonl"
GIT_SECONDS = 10.0


@dataclass(frozen=True)
class Session:
    """From a start to its end. Times are seconds since 1970; `reached` and `end` are None where nobody knows."""

    begin: float
    step: int
    epoch: int
    world_size: int
    host: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # device, versions, git
    end: float | None = None
    reached: int | None = None

    def lost(self, after: Session) -> int | None:
        """Steps that were made here and again in the session after."""
        return None if self.reached is None else max(self.reached - after.step, 0)


def start_row(step: int, epoch: int, world_size: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The row of this process's start. `facts`: JSON values that say what it runs on."""
    place = {"step": step, "epoch": epoch, "world_size": world_size, "host": socket.gethostname()}
    return {"kind": "start", "time": time.time(), **place, **facts}


def note_end(run: Path) -> None:
    """Add how far the session before came, from its heartbeats, before they are cleared. Trouble here is no harm."""
    with contextlib.suppress(OSError):
        rows = read_rows(run / SESSIONS)
        seen = _last_sign(run)
        if rows and rows[-1].get("kind") == "start" and seen:
            append_row(run / SESSIONS, {"kind": "end", "time": seen[0], "step": seen[1]})


def read_sessions(run: Path) -> list[Session]:
    """All sessions, the first one first; [] for a run of which none was noted. Rows that make no sense are left out."""
    found: list[Session] = []
    rows = read_rows(run / SESSIONS)
    seen = _last_sign(run)
    if rows and rows[-1].get("kind") == "start" and seen:
        rows.append({"kind": "end", "time": seen[0], "step": seen[1]})
    for row in rows:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if row["kind"] == "start":
                known = ("kind", "time", "step", "epoch", "world_size", "host")
                facts = {name: value for name, value in row.items() if name not in known}
                place = (int(row["step"]), int(row["epoch"]), int(row["world_size"]), str(row["host"]))
                found.append(Session(float(row["time"]), *place, facts))
            elif found:
                last = found.pop()
                end, reached = float(row["time"]), max(int(row["step"]), last.step)
                found.append(Session(**{**vars(last), "end": end, "reached": reached}))
    return found


def _last_sign(run: Path) -> tuple[float, int] | None:
    """(when a rank last spoke, steps that are known to have been made by then), from heartbeats and metrics."""
    beats = read_all(run)
    if not beats:
        return None
    steps = [beat.total for beat in beats]
    steps += [int(row["step"]) for row in read_rows(run / METRICS)[-1:] if isinstance(row.get("step"), int)]
    with contextlib.suppress(OSError):
        return max(path_of(run, beat.rank).stat().st_mtime for beat in beats), max(steps)
    return None


def processor() -> str:
    """What this machine calls its processor."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """The commit of the code, and whether it was changed since: {} where it is not in a git work tree.

    That of this package where it is a checkout, else that of the current folder.
    """
    for folder, file in ((Path(__file__).parent, Path(__file__).name), (Path.cwd(), ".")):
        if _git(folder, "ls-files", "--error-unmatch", file) is None:
            continue
        commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "-uno")
        if commit:
            return {"commit": commit.strip(), "changed": bool(changes)}
    return {}


def _git(folder: Path, *words: str) -> str | None:
    """What git answers, None if it fails."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout
