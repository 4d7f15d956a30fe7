"""Jobs on a real SLURM cluster: the same run as in one process, whatever starts it and whatever happens to it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, words_of
from tests.slurm.jobs import BATCH, LONG, QUICK, losses, rows, state, submit, train_alone, weights
from tests.support import ROOT


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, stripes_set: Path) -> Path:
    """The run that all interrupted ones must equal, in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_alone(folder, "--data", stripes_set, *LONG, "--output", "run")
    return folder / "run"


def test_two_jobs_on_the_same_nodes_are_the_run_of_one_process(
    cluster: Cluster, tmp_path: Path, digits_set: Path
) -> None:
    flags = ("--data", digits_set, *QUICK, "--epochs", "2")
    odd = tmp_path / 'it\'s "my" run, 100% $HOME'  # the run folder's name goes through sbatch, bash and srun
    ports = []
    first = submit(cluster, tmp_path, "--nodes", "2", "--time", "5", "--", *flags, "--output", odd)
    second = submit(cluster, tmp_path, "--nodes", "2", "--time", "5", "--", *flags, "--seed", "1", "--output", "b")
    train_alone(tmp_path, *flags, "--output", "alone")
    for number, run in ((first, odd), (second, tmp_path / "b")):
        facts = cluster.wait_to_end(number)
        log = (run / "logs" / f"slurm-{number}.out").read_text()
        assert facts["JobState"] == "COMPLETED", log
        assert "2 processes on cpu" in log
        ports.append(log.split("meeting at ")[1].split(",")[0])
    assert len(set(ports)) == 2
    assert losses(odd) == losses(tmp_path / "alone")
    assert weights(odd) == weights(tmp_path / "alone") != weights(tmp_path / "b")


def test_asked_to_stop_it_saves_is_queued_again_and_goes_on(
    cluster: Cluster, tmp_path: Path, stripes_set: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--data", stripes_set, *LONG, "--wandb-mode", "offline", "--output", run)
    number = submit(cluster, tmp_path, "--nodes", "2", "--time", "5", "--", *flags)
    cluster.wait(lambda: len(rows(run)) > 5, "steps are made")
    assert cluster.call("scancel", "--batch", "--signal=USR1", number).code == 0
    cluster.wait_for(number, "PENDING")
    log = (run / "logs" / f"slurm-{number}.out").read_text()
    assert "ended with exit code 75" in log
    stopped = state(run)
    assert stopped["position"]["total"] == len(losses(run))  # all ranks stopped at the step that was saved
    facts = cluster.wait_to_end(number)
    log = (run / "logs" / f"slurm-{number}.out").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert f"from step_{stopped['position']['total']:08d}" in log
    assert state(run)["wandb_id"] == stopped["wandb_id"] != ""
    steps = [step for step, _ in losses(run)]
    assert steps == list(range(1, len(steps) + 1))  # no seam: none missing, none twice
    assert losses(run) == losses(uninterrupted)
    assert weights(run) == weights(uninterrupted)


def test_the_time_limit_asks_it_to_stop_and_scancel_ends_it(
    cluster: Cluster, tmp_path: Path, stripes_set: Path
) -> None:
    flags = ("--data", stripes_set, *QUICK, *BATCH, "--epochs", "100000", "--eval-every", "1000", "--output", "run")
    number = submit(cluster, tmp_path, "--time", "1", "--warn-seconds", "50", "--", *flags)
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", "it is queued again")
    log = tmp_path / "run" / "logs" / f"slurm-{number}.out"
    assert "USR1: asking the ranks to save and stop" in log.read_text()
    before = state(tmp_path / "run")["position"]["total"]
    cluster.hurry(number)
    cluster.wait(lambda: bool(rows(tmp_path / "run")) and rows(tmp_path / "run")[-1]["step"] > before, "it goes on")
    assert cluster.call("scancel", number).code == 0
    assert cluster.wait_for(number, "CANCELLED", "PENDING")["JobState"] == "CANCELLED"  # SLURM would requeue that, too
    assert "cancelled: saved, not queued again" in log.read_text()
    assert state(tmp_path / "run")["position"]["total"] > before


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, tmp_path: Path, stripes_set: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    number = submit(
        cluster, tmp_path, "--nodes", "2", "--time", "5", "--", "--data", stripes_set, *LONG, "--output", run
    )
    cluster.wait(lambda: len(rows(run)) > 5, "steps are made")
    cluster.lose_node("n2")
    try:
        cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", "SLURM queues it again")
    finally:
        cluster.start_node("n2")
        cluster.wait_for_nodes()
    facts = cluster.wait_to_end(number)
    assert facts["JobState"] == "COMPLETED", (run / "logs" / f"slurm-{number}.out").read_text()
    assert losses(run) == losses(uninterrupted)
    assert weights(run) == weights(uninterrupted)


def test_a_killed_rank_is_started_again_within_the_job(
    cluster: Cluster, tmp_path: Path, stripes_set: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    words = ("--gpus-per-node", "2", "--time", "5")  # two ranks on one node, each with a placeholder of a GPU
    number = submit(cluster, tmp_path, *words, "--", "--data", stripes_set, *LONG, "--output", run)
    cluster.wait(lambda: len(rows(run)) > 5, "steps are made")
    ranks = [p for p in cluster.processes(f"SLURM_JOB_ID={number}", "LOCAL_RANK=1") if "python" in words_of(p)[0]]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    facts = cluster.wait_to_end(number)
    log = (run / "logs" / f"slurm-{number}.out").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), log
    assert "2 processes on cpu" in log and "resuming" in log
    assert losses(run) == losses(uninterrupted)
    assert weights(run) == weights(uninterrupted)


FAKE = """#!/bin/sh
echo 75 > "$DISTCNN_VERDICTS/0"    # stopped on request and saved, but no checkpoint has moved
"""


def test_a_job_that_makes_no_step_is_not_queued_again_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    fake, script = tmp_path / "fake", tmp_path / "job.sbatch"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    script.write_text(f"#!/bin/bash\nrun={tmp_path}/run\npython={fake}\nsource {ROOT}/launch/batch.sh\n")
    number = cluster.sbatch("--requeue", "--open-mode=append", "--time=5", script, cwd=tmp_path)
    facts = cluster.wait_to_end(number)
    log = (tmp_path / f"slurm-{number}.out").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "2"), log
    assert log.count("ended with exit code 75") == 3 and "no step was made in 3 starts" in log
