"""The README's section on clusters: every command in it, as it stands, on a real SLURM cluster."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import rows, weights
from tests.support import ROOT

QUEUED = re.compile(r"[Ss]ubmitted (?:batch )?job (\d+)")


def commands(title: str) -> list[str]:
    """The indented lines of a section of the README."""
    text = (ROOT / "README.md").read_text()
    section = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like this checkout with its environment, without its runs and data."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("launch", "slurm", "train.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_each_command_of_the_section_on_clusters(cluster: Cluster, checkout: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # what `uv run` does
    lines = commands("On a cluster")
    assert len(lines) == 10 and any(line.startswith("scancel") for line in lines)
    jobs: list[str] = []
    for line in lines:
        if "JOB" in line:
            cluster.wait(lambda: len(rows(checkout / "runs" / "first")) > 0, "the first job makes steps")
            line = line.replace("JOB", jobs[0])
        outcome = cluster.call(
            "bash", "-c", line.removeprefix("uv run "), cwd=checkout, PATH=path, WANDB_MODE="offline"
        )
        assert outcome.code == 0, f"{line}\n{outcome.out}\n{outcome.err}"
        jobs += QUEUED.findall(outcome.out)
    assert len(jobs) == 3
    for number in (jobs[0], jobs[1], *(f"{jobs[2]}_{seed}" for seed in range(3))):
        assert cluster.wait_to_end(number)["JobState"] == "COMPLETED", cluster.last_words()
    assert cluster.job(jobs[0])["Restarts"] == "1"
    runs = [checkout / "runs" / name for name in ("first", "by-script", "by-torchrun", "by-accelerate")]
    assert len({weights(run) for run in runs}) == 1
