"""One cluster for all tests of a session, and a folder to submit from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable
from tests.support import skip_or_fail


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM cluster of two nodes."""
    why = unavailable()
    if why:
        skip_or_fail(f"no SLURM here: {why}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as running:
        yield running
