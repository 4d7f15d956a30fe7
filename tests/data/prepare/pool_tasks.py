"""What workers do in the tests of the pool. Workers import this module: it imports nothing heavy."""

from __future__ import annotations

import os
import signal
import time


def slow_first(i: int) -> int:
    time.sleep(0.2 if i == 0 else 0.0)
    return i * i


def die(i: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return i


def eat(i: int) -> int:
    raise MemoryError


def fail(i: int) -> int:
    raise ZeroDivisionError(i)
