"""The run folder: who owns it, what it resumes from, and its files of one JSON object a line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distcnn.checkpoint import FOLDER, newest_whole, step_of, verify
from distcnn.config import FREE_ON_RESUME, TrainConfig, flatten, load_toml, to_toml
from distcnn.errors import UserError
from distcnn.files import write_atomically

CONFIG, METRICS, LEDGER, QUARANTINE, RESULTS = (
    "config.toml",
    "metrics.jsonl",
    "ledger.jsonl",
    "quarantine.jsonl",
    "results.json",
)


def open_run(config: TrainConfig) -> tuple[Path | None, list[str]]:
    """Make or take over the run folder; called by rank 0 alone. Returns (checkpoint to resume from or None, warnings).

    Raises UserError if the folder cannot be written or holds another run.
    """
    run = config.output
    chosen = None if config.run.resume in ("auto", "never") else _chosen(Path(config.run.resume))
    if config.run.resume == "never" and run.exists():
        _move_aside(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {run} cannot be written: {error.strerror or error}") from error
    if not os.access(run, os.W_OK):
        raise UserError(f"--output {run} cannot be written: permission denied")
    saved = run / CONFIG
    if saved.exists():
        check_same_run(config, flatten(load_toml(saved)), str(run))
    elif any(path.name != "logs" and not path.name.startswith(".") for path in run.iterdir()):
        raise UserError(f"--output {run} holds files of something else: give another folder")
    else:
        save_config(config)
    if chosen:
        return chosen, []
    checkpoint, complaints = newest_whole(run)
    if complaints and checkpoint is None:
        raise UserError(f"no checkpoint of {run} can be used ({complaints[0]}): --resume never begins anew")
    return checkpoint, [f"{wrong}: going back to the checkpoint before" for wrong in complaints]


def save_config(config: TrainConfig) -> None:
    """Write config.toml; for a run that goes on, once it is sure that it does. Raises OSError."""
    write_atomically(config.output / CONFIG, to_toml(config).encode())


def _chosen(path: Path) -> Path:
    path = path.resolve()
    if step_of(path) < 0 or not path.is_dir():
        raise UserError(
            f"--resume {path} is no checkpoint: auto, never, or a folder such as runs/x/{FOLDER}/step_00000100"
        )
    wrong = verify(path)
    if wrong:
        raise UserError(f"--resume {path} cannot be used: {wrong}")
    return path


def check_same_run(config: TrainConfig, before: Mapping[str, Any], where: str) -> None:
    """Raises UserError with all differences if `before`, the flat config of what is in `where`, is another run's."""
    mine = flatten(config)
    changed = [name for name in mine if name not in FREE_ON_RESUME and mine[name] != before.get(name)]
    if changed:
        what = ", ".join(f"{name} was {before.get(name)!r}, now {mine[name]!r}" for name in changed)
        raise UserError(f"{where} holds another run ({what}): give a new --output, or --resume never to begin anew")


def _move_aside(run: Path) -> None:
    number = 1
    while (aside := run.with_name(f"{run.name}.old{number}")).exists():
        number += 1
    run.rename(aside)


class RowFile:
    """A .jsonl file that grows. On a full disk its rows wait in memory, with one warning, until there is space."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._waiting: deque[Mapping[str, Any]] = deque()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, after those that wait."""
        self._waiting.append(row)
        try:
            while self._waiting:
                append_row(self._path, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if len(self._waiting) == 1:
                self._warn(f"{self._path} cannot be written ({error.strerror or error}): its rows wait for space")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line, in a single write, so that those of several processes do not mix. All or OSError.

    A number that is not finite becomes null: JSON has no word for it.
    """
    values = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    line = (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        written = file.write(line)
        if written != len(line):  # the disk became full within the line
            file.truncate(file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file, [] if there is none. A last line cut by a kill is left out, as is all that
    follows a line that is no object.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def cut_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that `keep` does not want: a resumed run writes them again."""
    kept = [row for row in read_rows(path) if keep(row)]
    if path.exists():
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
