"""The scripts in slurm/ as they lie there, on a real SLURM cluster."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import BATCH, QUICK, losses, submit, train_alone, weights
from tests.support import ROOT

SHORT = (*QUICK, *BATCH, "--epochs", "2", "--log-every", "1")
ASKS = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=5")  # this cluster is small
SEEDS = (0, 1, 2)


def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user has who calls sbatch in the folder of the checkout, with its environment active."""
    import sys

    monkeypatch.setenv("DISTCNN_HOME", str(ROOT))
    monkeypatch.setenv("python", sys.executable)


def test_a_wrong_flag_ends_in_seconds_with_one_line(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch)
    begun = time.monotonic()
    number = cluster.sbatch(*ASKS, ROOT / "slurm" / "train.sbatch", "--epoch", "3", cwd=tmp_path)
    facts = cluster.wait_to_end(number, seconds=30)
    log = (tmp_path / f"slurm-{number}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert log.count("\n") == 1 and "--epoch" in log and "--epochs" in log, log
    assert time.monotonic() - begun < 30
    assert not (tmp_path / "runs").exists()


def test_bad_data_ends_it_without_restarts_and_says_so_once(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch)
    script = ROOT / "slurm" / "one-node.sbatch"
    number = cluster.sbatch(*ASKS, "--gpus-per-node=2", script, "--data", "none", *SHORT, cwd=tmp_path)
    facts = cluster.wait_to_end(number)
    log = (tmp_path / f"slurm-{number}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert log.count("error:") == 1 + log.count("srun: error:") and "no dataset.json in none" in log
    assert "Traceback" not in log


def test_seeds_as_a_job_array(
    cluster: Cluster, tmp_path: Path, stripes_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch)
    flags = ("--data", stripes_set, *SHORT)
    number = cluster.sbatch(*ASKS, ROOT / "slurm" / "seeds.sbatch", *flags, cwd=tmp_path)
    for seed in SEEDS:
        facts = cluster.wait_to_end(f"{number}_{seed}")
        assert facts["JobState"] == "COMPLETED", (tmp_path / f"slurm-{number}_{seed}.out").read_text()
    runs = [tmp_path / "runs" / f"stripes-cnn-seed{seed}" for seed in SEEDS]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert [result["seed"] for result in results] == list(SEEDS)
    assert len({weights(run) for run in runs}) == len(SEEDS)
    train_alone(tmp_path, *flags, "--seed", "1", "--output", "alone")
    assert weights(tmp_path / "alone") == weights(runs[1])


def test_accelerate_on_two_nodes_is_the_same_run(
    cluster: Cluster, tmp_path: Path, stripes_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch)
    flags = ("--data", stripes_set, *SHORT)
    number = cluster.sbatch(*ASKS, ROOT / "slurm" / "accelerate.sbatch", *flags, "--output", "run", cwd=tmp_path)
    train_alone(tmp_path, *flags, "--output", "alone")
    facts = cluster.wait_to_end(number)
    log = (tmp_path / f"slurm-{number}.out").read_text()
    assert facts["JobState"] == "COMPLETED" and "2 processes on cpu" in log, log
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")


def test_prepare_on_a_cpu_node_then_train(cluster: Cluster, tmp_path: Path) -> None:
    flags = ("--data", "shards", *SHORT, "--epochs", "1", "--output", "run")
    first = ("--prepare", "digits --output shards", "--prepare-cpus", "1", "--time", "5")
    number = submit(cluster, tmp_path, *first, "--", *flags)
    assert cluster.wait_to_end(number)["JobState"] == "COMPLETED", cluster.last_words()
    assert (tmp_path / "shards" / "dataset.json").exists()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["train_samples"] == 1438
