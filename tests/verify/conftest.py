"""What `distcnn verify` has to look at, for the trainer as it is and with each mutant: made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distcnn.config import from_flat
from distcnn.verify.evidence import Evidence
from distcnn.verify.verify import Prepared, Request, prepare
from tests.verify.mutants import MUTANTS
from tests.verify.runs import make_run, run_many


@pytest.fixture(scope="session")
def ready(stripes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A small CNN with two steps of 16 images in 4 lanes, the second one ragged."""
    changes = {
        "data": str(stripes_set),
        "output": str(tmp_path_factory.mktemp("verify") / "out"),
        "channels": [8],
        "hidden": 0,
        "global_batch_size": 16,
        "tile_size": 4,
        "lr": 0.01,
    }
    return prepare(Request(from_flat(changes), ("gradients",), "1,2", steps=2))


@pytest.fixture(scope="session")
def evidence_of(ready: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Evidence]:
    """mutant -> what `verify` has to look at, from runs with 1 and 2 real processes."""
    folder = tmp_path_factory.mktemp("mutants")
    names = ["", *(mutant.__name__ for mutant in MUTANTS)]
    batches = {
        size: [(make_run(folder, f"{name}-{size}", size, ready.short, keep=(0, 1)), {"mutant": name}) for name in names]
        for size in (2, 1)
    }
    traces = run_many(folder, batches)

    def evidence(name: str) -> Evidence:
        own = {str(size): traces[f"{name}-{size}"] for size in (1, 2)}
        return Evidence(ready.request.config, ready.dataset, ready.short, ready.small, ready.steps, own)

    return evidence
