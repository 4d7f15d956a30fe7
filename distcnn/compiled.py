"""Kernels that Numba compiles, where it is installed: the same bits as torch's, in less time.

Each is compared with the torch code that it replaces when it is first asked for, and left out if a bit differs, so that
what a run computes does not depend on whether Numba is there. They do not hold the interpreter's lock.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

Kernel = Callable[..., Any]
_lock = threading.RLock()  # whether one kernel is exact may be found with another


def kernel(
    choose: Callable[[ModuleType], tuple[Any, str]], is_exact: Callable[[Kernel], bool]
) -> Callable[[], Kernel | None]:
    """A function that returns the kernel, compiled at its first call, or None where there is none to be had.

    choose: from `distcnn.numba_kernels` the kernel and its signature; is_exact: whether it gives torch's bits.
    """
    made = cache(lambda: _make(choose, is_exact))

    def once() -> Kernel | None:
        with _lock:  # threads that decode ask at the same time
            return made()

    return once


def _make(choose: Callable[[ModuleType], tuple[Any, str]], is_exact: Callable[[Kernel], bool]) -> Kernel | None:
    try:
        import numba
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return None
    try:
        with _vectorising(numba.config):
            from distcnn import numba_kernels

            dispatcher, signature = choose(numba_kernels)
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        if is_exact(dispatcher):
            return dispatcher  # type: ignore[no-any-return]
        reason = "here it does not give the bits that torch gives"
    except Exception as error:  # a processor, or a version of a library, that Numba does not know
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    warnings.warn(f"a kernel of Numba's is not used, torch takes longer ({reason})", RuntimeWarning, stacklevel=2)
    return None


@contextmanager
def _vectorising(config: Any) -> Iterator[None]:
    """Let LLVM turn statements that do the same to neighbours into one, which Numba leaves out by default."""
    before = config.SLP_VECTORIZE
    config.SLP_VECTORIZE = 1
    try:
        yield
    finally:
        config.SLP_VECTORIZE = before
