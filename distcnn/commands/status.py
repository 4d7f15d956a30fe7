"""How runs stand: live or dead, SLURM's state, starts, the last step, the time left. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Which runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Run folders (default: all in runs/)"""


def run(options: Options) -> int:
    """Print each run's status; 0."""
    from distcnn.errors import UserError
    from distcnn.runfolder import CONFIG
    from distcnn.status import look

    runs = options.runs or tuple(sorted(path.parent for path in Path("runs").glob(f"*/{CONFIG}")))
    if not runs:
        raise UserError("no run in runs/: name a run folder")
    for folder in runs:
        status = look(folder)
        print(f"{folder}: {status.state}" + (f" ({status.detail})" if status.detail else ""))
        for name, value in status.rows.items():
            print(f"  {name:<10} {value}")
    return 0
