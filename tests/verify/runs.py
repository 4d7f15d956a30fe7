"""Runs real processes over many runs, and makes the evidence that the checks look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distcnn.config import TrainConfig, from_flat
from distcnn.verify.evidence import Evidence
from distcnn.verify.launch import Trace, read_trace
from distcnn.verify.plan import CheckName, Run
from distcnn.verify.result import Result
from distcnn.verify.verify import CHECK_FUNCTIONS
from tests.support import ROOT, command, python, torchrun


def run_many(folder: Path, batches: dict[int, Sequence[tuple[Run, dict[str, Any]]]]) -> dict[str, Trace]:
    """Start one group of real processes for each number of them, and let it make all of its runs; their traces.

    batches: number of processes -> (run, what is special about it: see many.py). Two groups at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def work(processes: int) -> list[Trace]:
        entries = []
        for run, special in batches[processes]:
            usual = {"mutant": "", "float64": False, "stop_at": -1}
            entries.append(usual | special | {"spec": str(run.write())})
        listing = folder / f"{processes}.json"
        listing.write_text(json.dumps(entries))
        words = ("-m", "tests.verify.many", listing)
        outcome = command(python(*words) if processes == 1 else torchrun(processes, *words), ROOT, seconds=300)
        assert outcome.code == 0, outcome.err
        return [read_trace(run, outcome.code, False, 0.0) for run, _ in batches[processes]]

    with ThreadPoolExecutor(2) as pool:
        return {trace.run.name: trace for traces in pool.map(work, batches) for trace in traces}


def make_run(
    folder: Path, name: str, processes: int, base: TrainConfig, keep: tuple[int, ...] = (), **more: Any
) -> Run:
    """A run of `base` with changes, in its own folders."""
    config = from_flat({"output": str(folder / "runs" / name), **more}, "test", base=base)
    return Run(name, processes, config, folder / "traces" / name, keep)


def check(name: CheckName, evidence: Evidence) -> Result:
    return CHECK_FUNCTIONS[name](evidence)
