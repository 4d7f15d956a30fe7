"""Mends the launchers.

`accelerate launch --cpu --num_processes N` starts a single process whatever N is: Accelerate (1.15) hands CPU runs to
its simple launcher, which leaves the number of processes to mpirun and, without mpirun, forgets it. The process that
was started then becomes torchrun with the number that was asked for.

And when a launcher is killed (SIGKILL; SIGTERM of accelerate's simple one), its processes go on: here they ask the
kernel to be told.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distcnn.errors import UserError
from distcnn.world import launched_alone_by_accelerate, launched_by_torchrun

_NUMBER = re.compile(r"--num[_-]processes(?:=(\d+))?")
_LAUNCHER = re.compile(r"(torchrun|accelerate|torch\.distributed\.(run|launch)|accelerate\.commands\.\w+)(\.py)?")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def forgotten_processes(environ: Mapping[str, str] | None = None, parent: Sequence[str] | None = None) -> int:
    """How many processes `accelerate launch` was asked for and did not start; 0 where all is well.

    `parent` is the parent process's command line, read from /proc if it is not given. Raises UserError where the
    number cannot be found out (it stands in a config file, say).
    """
    if not launched_alone_by_accelerate(environ):
        return 0
    words = _parent_words() if parent is None else list(parent)
    for word, following in zip(words, [*words, ""][1:], strict=True):
        match = _NUMBER.fullmatch(word)
        if match:
            number = match[1] or following
            if number.isdecimal():
                return int(number) if int(number) > 1 else 0
    raise UserError(
        "'accelerate launch' on the CPU started one process of several: give it --num_processes on the command line,"
        " or start with 'torchrun --nproc-per-node=N train.py'"
    )


def become_torchrun(processes: int, argv: Sequence[str]) -> None:
    """Replace this process by torchrun with `processes` of `argv` (a script and its flags). Does not return."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *argv]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def end_with_launcher() -> None:
    """Be sent SIGTERM when the launcher ends, however it ends: the run then saves itself and stops.

    Only under torchrun and accelerate; a run started from a shell outlives it. Linux only (prctl(2)); holds for what
    this process becomes by exec, too. Raises UserError if the launcher has ended already.
    """
    words = _parent_words()
    if any(_LAUNCHER.fullmatch(Path(word).name) for word in words):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        words = _parent_words()  # it may have ended before the call
    if launched_by_torchrun() and os.getppid() == 1 and "python" not in Path(words[0] if words else "").name:
        raise UserError("torchrun has ended before the process that it started")  # and init has taken its place


def _parent_words() -> list[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []
