"""The text of jobs, compared with recorded files; sweeps and time limits; what bash makes of the quoting."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distcnn.config import TrainConfig
from distcnn.errors import UserError
from distcnn.site import Site
from distcnn.submit import Job, Task, launch_folder, render, render_prepare, runs, seconds_of, sweep

RECORDED = Path(__file__).parent / "recorded"
PLAIN = Job(
    name="photos",
    tasks=(Task(Path("/work/runs/photos")),),
    flags=("--data", "data/photos", "--epochs", "90", "--output", "runs/photos"),
    nodes=2,
    gpus=8,
    ranks=8,
    cpus=64,
    time="4:00:00",
    log=Path("/work/runs/photos/logs/slurm-%j.out"),
    folder=Path("/work"),
    launch=Path("/opt/distcnn/launch"),
    python="/opt/venv/bin/python",
    site=Site(),
)
SITE = Site(
    partition="gpu",
    account="p42",
    memory="0",
    gpus="--gres=gpu:a100:{n}",
    sbatch=("--exclusive",),
    srun=("--mpi=none",),
    modules=("cuda/12.8", "it's"),
    setup=("export NCCL_IB_HCA=mlx5",),
    container=("apptainer", "exec", "--nv", "/images/my image.sif"),
    python="python3",
    host_suffix="-ib",
)
ARRAY = dataclasses.replace(
    PLAIN,
    tasks=tuple(Task(Path(f"/work/runs/x-seed{n}"), ("--seed", str(n), "--output", f"runs/x-seed{n}")) for n in (0, 1)),
    at_once=1,
    log=Path("/work/runs/x-slurm/slurm-%A_%a.out"),
    python="python3",
    site=SITE,
)
ODD = dataclasses.replace(
    PLAIN,
    name="it's",
    tasks=(Task(Path('/w/100% "my" $HOME `run` it\'s')),),
    flags=("--wandb-name", "a b; rm -rf $HOME", "--output", '/w/100% "my" $HOME `run` it\'s'),
    gpus=0,
    cpus=0,
    log=Path('/w/100% "my" $HOME `run` it\'s/logs/slurm-%j.out'),
)


@pytest.mark.parametrize(("job", "name"), [(PLAIN, "plain"), (ARRAY, "array"), (ODD, "odd")])
def test_the_text_is_the_recorded_one(job: Job, name: str) -> None:
    assert render(job) == (RECORDED / f"{name}.sbatch").read_text()


def test_the_text_of_the_preparation_is_the_recorded_one() -> None:
    log = Path("/work/runs/photos/logs/prepare-%j.out")
    text = render_prepare("prepare-photos", ["folder", "my photos", "--output", "data/x"], 8, "2:00:00", log, ARRAY)
    assert text == (RECORDED / "prepare.sbatch").read_text()


@pytest.mark.parametrize("job", [PLAIN, ARRAY, ODD])
@pytest.mark.parametrize("task", [0, 1])
def test_bash_reads_back_what_was_meant(job: Job, task: int, tmp_path: Path) -> None:
    task = task if job.is_array else 0
    (tmp_path / "batch.sh").write_text('printf "%s\\0" "$run" "$python" "${container[@]}" -- "$@"\n')
    text = render(dataclasses.replace(job, launch=tmp_path, site=dataclasses.replace(job.site, modules=(), setup=())))
    environment = {"SLURM_ARRAY_TASK_ID": str(task), "PATH": "/usr/bin:/bin", "HOME": "/root"}
    read = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
    meant = job.tasks[task]
    words = [str(meant.run), job.python, *job.site.container, "--", *job.flags, *meant.flags]
    assert read.stdout.split("\0")[:-1] == words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": 0}, "nodes = 0"),
        ({"time": "soon"}, "'soon'"),
        ({"time": "2:00"}, "--warn-seconds 180"),
        ({"warn_seconds": 5}, "--warn-seconds 5"),
        ({"tasks": ()}, "0 runs"),
        ({"max_restarts": -1}, "max_restarts = -1"),
    ],
)
def test_a_job_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize("folder", ["/w/a\nb", "/w/a\\b"])
def test_names_that_slurm_cannot_take_are_refused(folder: str) -> None:
    with pytest.raises(UserError, match="backslash or line break"):
        render(dataclasses.replace(PLAIN, log=Path(folder) / "slurm-%j.out"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("10:30", 630),
        ("4:00:00", 14400),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("2-00:00:01", 172801),
    ],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "-1", "1:2:3:4", "1-", "1.5"])
def test_no_time_limits(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        seconds_of(text)


def test_a_sweep_makes_every_combination() -> None:
    assert sweep(["seed=0..2"]) == [(("--seed", str(n)), f"seed{n}") for n in range(3)]
    assert [name for _, name in sweep(["lr=0.1,3e-4", "model=cnn,a/b"])] == [
        "lr0.1-modelcnn",
        "lr0.1-modela_b",
        "lr3e-4-modelcnn",
        "lr3e-4-modela_b",
    ]
    assert sweep(["weight_decay=0"])[0][0] == ("--weight-decay", "0")


@pytest.mark.parametrize(
    "words", [["seed"], ["=1"], ["seed="], ["seed=1,1"], ["seed=1,,2"], ["seed=3..1"], ["a=1", "a=2"]]
)
def test_no_sweeps(words: list[str]) -> None:
    with pytest.raises(UserError, match="--array"):
        sweep(words)


def test_runs_of_a_sweep_have_folders_of_their_own_and_are_checked_one_by_one() -> None:
    base, tasks = runs(["seed=0,1"], ("--data", "x"), TrainConfig())
    assert (base.name, [task.run.name for task in tasks]) == ("digits-cnn", ["digits-cnn-seed0", "digits-cnn-seed1"])
    with pytest.raises(UserError, match="dropout2: --dropout 2"):
        runs(["dropout=0.1,2"], (), TrainConfig())
    with pytest.raises(UserError, match="resume never"):
        runs(["seed=0,1"], ("--resume", "never"), TrainConfig())


def test_the_launch_scripts_are_found() -> None:
    assert {"batch.sh", "node.sh", "worker.sh"} <= {path.name for path in launch_folder().iterdir()}
