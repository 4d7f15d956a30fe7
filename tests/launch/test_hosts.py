"""launch/torchrun.sh on two hosts that see the same files: the same run, and no loss when the network breaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import ADDRESSES, Hosts, two_hosts, unavailable
from tests.slurm.jobs import LONG, losses, rows, train_alone, weights
from tests.support import ROOT, clean_environment, skip_or_fail

SECONDS = 240


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    why = unavailable()
    if why:
        skip_or_fail(f"no hosts: {why}")
    with two_hosts() as made:
        yield made


def start(hosts: Hosts, folder: Path, *flags: str | Path) -> list[subprocess.Popen[str]]:
    """The same command on both hosts."""
    started = []
    for node in (0, 1):
        own = ("--nodes", "2", "--node", str(node), "--host", ADDRESSES[0], "--port", "29500", "--max-restarts", "0")
        words = [*hosts.on(node), str(ROOT / "launch" / "torchrun.sh"), *own, "--", *map(str, flags)]
        with (folder / f"host{node}.txt").open("a") as out:
            environment = clean_environment(DISTCNN_PYTHON=sys.executable, DISTCNN_GRACE="5")
            started.append(
                subprocess.Popen(
                    words, cwd=folder, env=environment, stdout=out, stderr=out, text=True, start_new_session=True
                )
            )
    return started


def finish(started: list[subprocess.Popen[str]], hosts: Hosts, seconds: float = SECONDS) -> list[int]:
    """Their exit codes. Whatever still runs on the hosts is killed."""
    try:
        return [process.wait(seconds) for process in started]
    finally:
        for name in hosts.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
            for number in found.stdout.split():
                os.kill(int(number), signal.SIGKILL)


def test_two_hosts_are_the_run_of_one_process_though_their_network_breaks(
    hosts: Hosts, tmp_path: Path, stripes_set: Path
) -> None:
    flags = ("--data", stripes_set, *LONG, "--output", tmp_path / "run", "--stall-timeout", "6")
    started = start(hosts, tmp_path, *flags)
    deadline = time.monotonic() + SECONDS
    while len(rows(tmp_path / "run")) < 6:
        assert time.monotonic() < deadline and all(process.poll() is None for process in started), said(tmp_path)
        time.sleep(0.1)
    hosts.cut()
    codes = finish(started, hosts)
    assert all(codes) and 75 not in codes, said(tmp_path)
    assert (tmp_path / "run" / "results.json").exists() is False
    hosts.mend()
    assert finish(start(hosts, tmp_path, *flags), hosts) == [0, 0], said(tmp_path)
    assert "2 processes on cpu" in said(tmp_path) and "resuming" in said(tmp_path)
    train_alone(tmp_path, *flags, "--output", "alone")
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")


def said(folder: Path) -> str:
    return "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob("host*.txt")))
