"""Ranks of a run as real processes, without a launcher: started, signalled and killed by the tests themselves.

They are forked by a server that has imported torch already (multiprocessing's forkserver), so that a run of two ranks
costs a second instead of ten. Each may be given a fault of faults/inject.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from distcnn.runfolder import METRICS, read_rows
from tests.support import clean_environment

PRELOAD = ["distcnn.train", "distcnn.commands.train", "distcnn.flags", "torchvision", "tests.faults.inject"]
SECONDS = 120.0  # that a run may take before the test fails
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOAD)

Fault = tuple[str, Mapping[str, Any]]  # the name of a function of inject.py, and its arguments


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Ranks:
    """`size` processes of `distcnn train FLAGS`. A context manager: whatever is left at the end is killed."""

    def __init__(
        self,
        folder: Path,
        size: int,
        flags: Sequence[str | Path],
        faults: Mapping[int, Sequence[Fault]] | None = None,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        base = clean_environment(**(environment or {}))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(size)}
        words = [str(flag) for flag in flags]
        self.processes = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            env = base | (meeting | own if size > 1 else {})
            listed = [*(faults or {}).get(rank, ()), *(faults or {}).get(-1, ())]
            arguments = (words, env, str(folder), str(self._path("out", rank)), str(self._path("err", rank)), listed)
            self.processes.append(_server.Process(target=_train, args=arguments))
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        if error is not None:
            print("\n".join(f"--- rank {rank}\n{self.out(rank)}{self.err(rank)}" for rank in range(self.size)))

    def wait(self, seconds: float = SECONDS) -> list[int | None]:
        """The exit codes, once all have ended; the negative number of the signal that killed one."""
        until = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            process.join(max(until - time.monotonic(), 0.01))
            if process.is_alive():
                pytest.fail(f"rank {rank} did not end within {seconds:g} s")
        return [process.exitcode for process in self.processes]

    def kill(self, rank: int, number: int) -> None:
        """Send a signal."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def out(self, rank: int = 0) -> str:
        return self._path("out", rank).read_text() if self._path("out", rank).exists() else ""

    def err(self, rank: int = 0) -> str:
        return self._path("err", rank).read_text() if self._path("err", rank).exists() else ""

    def until(self, what: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """Wait until `what()` is true; the test fails if the ranks end before."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > deadline or not any(process.is_alive() for process in self.processes):
                pytest.fail(f"did not happen within {seconds:g} s, or before the ranks ended")
            time.sleep(0.005)
        return found

    def _path(self, stream: str, rank: int) -> Path:
        return self.folder / f"{stream}-{rank}.txt"


def finish(folder: Path, size: int, flags: Sequence[str | Path], **more: Any) -> list[int | None]:
    """Run to the end; the exit codes."""
    with Ranks(folder, size, flags, **more) as ranks:
        return ranks.wait()


def at_step(run: Path, step: int) -> Callable[[], bool]:
    """Whether metrics.jsonl has reached a step (with --log-every 1)."""
    return lambda: any(row["step"] >= step for row in read_rows(run / METRICS)[-3:])


def _train(
    words: list[str], environment: Mapping[str, str], folder: str, out: str, err: str, faults: Sequence[Fault]
) -> None:
    """In the child: be a process that a launcher has just started."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, descriptor in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, descriptor)
        os.close(handle)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    from distcnn.cli import main
    from tests.faults import inject

    for name, arguments in faults:
        getattr(inject, name)(**arguments)
    sys.exit(main(["train", *words]))
