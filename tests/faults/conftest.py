"""The run that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ranks import finish
from tests.faults.runs import flags


@pytest.fixture(scope="session")
def reference(stripes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the uninterrupted run, by one process."""
    folder = tmp_path_factory.mktemp("reference")
    assert finish(folder, 1, flags(stripes_set, folder / "run")) == [0]
    return folder / "run"
