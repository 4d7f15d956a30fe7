"""The images of the small run, and the run that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ranks import finish
from tests.faults.runs import flags
from tests.support import make_stripes


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """83 training and 37 validation images of 8x8 px, 5 classes."""
    return make_stripes(tmp_path_factory.mktemp("images") / "stripes", 83, 37)


@pytest.fixture(scope="session")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the uninterrupted run, by one process."""
    folder = tmp_path_factory.mktemp("reference")
    assert finish(folder, 1, flags(images, folder / "run")) == [0]
    return folder / "run"
