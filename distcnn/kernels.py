"""Which of a GPU's kernels compute: those that give the same bits every time, or the fastest ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from distcnn.world import fix_cublas_workspace


@contextlib.contextmanager
def in_any_order() -> Iterator[None]:
    """Around sums of integers on a GPU, which are the same in any order: torch would warn of them as of all others."""
    exact, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(exact, warn_only=warns)


def choose_kernels(exact: bool) -> None:
    """For all that this process computes on GPUs from now on; before the first of it.

    exact: only kernels that add in one order. Of an operation that has none torch says so in a warning that names it,
    and the run goes on, no longer to the bit. Otherwise cuDNN times its algorithms for each new shape and takes the
    fastest, which need not be the same one in the next process.
    """
    if exact:
        fix_cublas_workspace()
        # Nothing here reads memory that it has not written: filling it would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(exact, warn_only=True)
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.benchmark = not exact
