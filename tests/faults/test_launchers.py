"""Rows 1 and 3 under the real launchers: torchrun and accelerate, killed, interrupted, restarting their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distcnn.checkpoint import newest_whole
from distcnn.runfolder import METRICS, read_rows
from tests.faults.chaos import chaos
from tests.faults.runs import flags, processes_of, results
from tests.support import ROOT, clean_environment, python, torchrun

SECONDS = 120.0


@contextmanager
def launched(folder: Path, run: Path, words: list[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher in a process group of its own, as in a shell; everything is killed in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "said.txt").open("wb") as said:
        launcher = subprocess.Popen(
            [str(word) for word in words],
            cwd=folder,
            env=clean_environment(),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            yield launcher
        finally:
            for pid in {launcher.pid, *processes_of(run)}:
                if pid != launcher.pid or launcher.poll() is None:
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()
            print((folder / "said.txt").read_text())


def until(what: object) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def reached(run: Path, step: int) -> bool:
    return any(row["step"] >= step for row in read_rows(run / METRICS)[-2:])


def test_killed_at_random_moments_under_torchrun(images: Path, tmp_path: Path) -> None:
    """A short version of `python tests/faults/chaos.py`: a rank, the launcher, and rank 0 in a save."""
    report = chaos(tmp_path, images, ["rank", "launcher", "save"], epochs=12, seed=1)
    assert report.kills.total() == 3 and report.restarts >= 1 and report.launches >= 2


ACCELERATE = python("-m", "accelerate.commands.launch")


@pytest.mark.parametrize(
    ("how", "number", "launch"),
    [
        ("accelerate, one process", signal.SIGKILL, [*ACCELERATE, "--cpu", ROOT / "train.py"]),
        pytest.param(
            "accelerate, two processes",
            signal.SIGTERM,
            [*ACCELERATE, "--cpu", "--num_processes", "2", ROOT / "train.py"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "torchrun, by a signal that it does not handle",
            signal.SIGUSR1,
            torchrun(2, ROOT / "train.py"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_processes_end_in_order_when_their_launcher_does(
    images: Path, tmp_path: Path, how: str, number: int, launch: list[str | Path]
) -> None:
    """However it ends: they save themselves and leave no orphan."""
    run = tmp_path / "run"
    slow = flags(images, run, "--epochs", "400")
    with launched(tmp_path / "a", run, [*launch, *slow]) as launcher:
        until(lambda: reached(run, 8))
        os.kill(launcher.pid, number)
        launcher.wait(60)
        until(lambda: not processes_of(run))
    assert results(run)["status"] == "stopped" and results(run)["saved"] and results(run)["reason"] == "SIGTERM"
    found, complaints = newest_whole(run)
    assert found is not None and not complaints and results(run)["step"] == int(found.name[5:])


def test_ctrl_c_under_torchrun_saves_once(images: Path, tmp_path: Path) -> None:
    """The terminal sends SIGINT to all processes of the group, and torchrun passes its own on."""
    run = tmp_path / "run"
    with launched(
        tmp_path / "a", run, torchrun(2, ROOT / "train.py", *flags(images, run, "--epochs", "400"))
    ) as launcher:
        until(lambda: reached(run, 8))
        os.killpg(launcher.pid, signal.SIGINT)
        launcher.wait(60)
        until(lambda: not processes_of(run))
    assert results(run)["reason"] == "SIGINT" and results(run)["saved"]
