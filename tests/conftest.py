"""Data sets for all tests; nothing changes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import make_stripes, skip_or_fail

torch.set_num_threads(1)  # the models here are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def stripes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """67 training and 37 validation images of 8x8 px, 5 classes.

    On 8 lanes of 4 they make steps of 32, 32 and 3: in the last, three tiles hold one sample and five hold none.
    """
    return make_stripes(tmp_path_factory.mktemp("data") / "stripes", 67, 37)


@pytest.fixture(scope="session")
def digits_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as `distcnn train` makes them."""
    from distcnn.data.prepare import prepare_digits

    root = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(root)
    return root


# What starts many real processes, a SLURM or network hosts and depends on their timing: `pytest -m slow`.
SLOW = ("faults/", "slurm/", "launch/test_hosts.py", "data/prepare/test_prepare_staging.py", "verify/test_proof")
SLOW_TOO = (
    "verify/test_verify.py",
    "verify/test_mutants.py",
    "verify/test_tampered.py",
    "test_tutorial.py",
    "test_compile.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow ones by their place."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(SLOW + SLOW_TOO):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def libturbojpeg() -> None:
    """It is installed, or the test is left out."""
    from distcnn.data import turbojpeg

    if turbojpeg.libturbojpeg() is None:
        skip_or_fail(f"{turbojpeg.SONAME} is not installed (apt-get install libturbojpeg0)")
