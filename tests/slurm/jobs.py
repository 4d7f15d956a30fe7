"""Training jobs for the cluster tests: how they are submitted, and what is looked at afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from tests.support import ROOT, command, python

QUICK = ("--threads", "1", "--wandb-mode", "disabled")
BATCH = ("--global-batch-size", "32", "--tile-size", "4")  # 8 lanes
# Minutes of training if nobody stops it: 83 images an epoch, evaluated seldom.
LONG = (*QUICK, *BATCH, "--epochs", "30", "--eval-every", "15", "--log-every", "1", "--keep-checkpoints", "100")


def submit(cluster: Cluster, folder: Path, *words: str | Path) -> str:
    """`distcnn submit` in `folder`; the job id."""
    outcome = cluster.call(*python("-m", "distcnn", "submit", "--cpus-per-rank", "1", *words), cwd=folder)
    assert outcome.code == 0, outcome.err
    match = re.findall(r"submitted job (\d+)", outcome.out)
    return str(match[-1])


def train_alone(folder: Path, *flags: str | Path) -> None:
    """The same training in one process, without SLURM."""
    outcome = command(python("-m", "distcnn", "train", *flags), folder)
    assert outcome.code == 0, outcome.err


def rows(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, training loss) of all rows."""
    return [(row["step"], row["train/loss"]) for row in rows(run) if "train/loss" in row]


def weights(run: Path) -> bytes:
    """The last checkpoint's weights, to the bit."""
    return (run / "checkpoints" / "latest" / "model.safetensors").read_bytes()


def state(run: Path, checkpoint: str = "latest") -> dict[str, Any]:
    """state.json of a checkpoint."""
    found: dict[str, Any] = json.loads((run / "checkpoints" / checkpoint / "state.json").read_text())
    return found


def script(name: str) -> Path:
    return ROOT / "slurm" / name
