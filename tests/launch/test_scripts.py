"""The shell scripts: exit codes, cores, flags by hand; `accelerate launch` by its config files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from distcnn.world import bound_processes
from tests.support import ROOT, command

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])
QUICK = ("--threads", "1", "--wandb-mode", "disabled", "--epochs", "1", "--global-batch-size", "32", "--tile-size", "4")


def fake(folder: Path, body: str) -> str:
    """A stand-in for Python that does what `body` says."""
    path = folder / "fake"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    assert command(["bash", "-n", script], ROOT).code == 0
    assert script.read_text().isascii()


@pytest.mark.parametrize(
    ("code", "heard", "noted"), [(0, 0, ""), (75, 0, "75"), (2, 0, "2"), (1, 1, "1"), (137, 137, "137")]
)
def test_a_worker_notes_how_it_ended(tmp_path: Path, code: int, heard: int, noted: str) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "1").write_text("of the start before\n")
    python = fake(tmp_path, f'[ "$*" = "-m distcnn train --wandb-name a\\ \\ b" ] || exit 9\nexit {code}')
    words = ["bash", LAUNCH / "worker.sh", "--wandb-name", r"a\ \ b"]
    done = command(words, tmp_path, LOCAL_RANK="1", DISTCNN_VERDICTS=str(notes), DISTCNN_PYTHON=python)
    assert done.code == heard, done.err
    assert [path.read_text().strip() for path in notes.iterdir()] == ([noted] if noted else [])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_each_worker_has_cores_of_its_own(tmp_path: Path) -> None:
    body = 'echo "$(taskset -cp $$ | sed "s/.*: //") $DISTCNN_BOUND $OMP_NUM_THREADS"'
    seen = []
    for rank in "01":
        environment = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "DISTCNN_VERDICTS": str(tmp_path)}
        done = command(["bash", LAUNCH / "worker.sh"], tmp_path, DISTCNN_PYTHON=fake(tmp_path, body), **environment)
        cores, bound, threads = done.out.split()
        assert (bound, threads) == ("2", str(len(os.sched_getaffinity(0)) // 2))
        seen.append(cores)
    assert seen[0] != seen[1]
    free = command(
        ["bash", LAUNCH / "worker.sh"], tmp_path, DISTCNN_BIND="0", **environment, DISTCNN_PYTHON=fake(tmp_path, body)
    )
    assert len(free.out.split()) == 2  # no DISTCNN_BOUND, and all cores
    assert [bound_processes({}), bound_processes({"DISTCNN_BOUND": "2"})] == [1, 2]


@pytest.mark.parametrize(
    ("notes", "torchrun", "code"),
    [
        ([], 0, 0),
        ([75, 75], 0, 75),
        ([75, 75], 1, 75),  # asked to stop, torchrun was as well
        ([75], 1, 101),  # the other one crashed
        ([75, 1], 1, 101),
        ([2, 2], 0, 102),
        ([2], 1, 102),
        ([], 1, 101),
        ([1], 1, 101),
    ],
)
def test_a_node_says_how_its_ranks_ended(tmp_path: Path, notes: list[int], torchrun: int, code: int) -> None:
    write = "".join(f'echo {note} > "$DISTCNN_VERDICTS/{rank}"\n' for rank, note in enumerate(notes))
    python = fake(tmp_path, f"{write}exit {torchrun}")
    done = command(["bash", LAUNCH / "node.sh"], tmp_path, DISTCNN_PYTHON=python, DISTCNN_RANKS="2")
    assert (done.code, done.err) == (code, "")


@pytest.mark.slow
def test_a_launcher_that_does_not_end_after_its_ranks_is_ended(tmp_path: Path) -> None:
    python = fake(tmp_path, 'echo 1 > "$DISTCNN_VERDICTS/0"; trap "exit 1" INT; while :; do sleep 0.1; done')
    done = command(["bash", LAUNCH / "node.sh"], tmp_path, 30, DISTCNN_PYTHON=python, DISTCNN_GRACE="1")
    assert done.code == 101


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "2"], "several nodes need"),
        (["--nodes", "two"], "--nodes needs a number"),
        (["--nodes", "2", "--node", "2", "--host", "a", "--port", "1"], "they count from 0"),
        (["--epochs", "3"], "--epochs is no flag of mine"),
        (["--ranks"], "--ranks needs a number"),
        (["--", "--epoch", "3"], "--epochs"),
    ],
)
def test_torchrun_by_hand_refuses_what_is_wrong_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    done = command([LAUNCH / "torchrun.sh", *words], tmp_path, DISTCNN_PYTHON=sys.executable)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.slow
def test_by_hand_and_by_accelerate_it_is_the_same_run(tmp_path: Path, stripes_set: Path) -> None:
    flags = ("--data", stripes_set, *QUICK)
    python = {"DISTCNN_PYTHON": sys.executable}
    ways: dict[str, tuple[list[str | Path], dict[str, str]]] = {
        "one": ([LAUNCH / "torchrun.sh", "--"], python),  # torchrun with one process: no DDP
        "two": ([LAUNCH / "torchrun.sh", "--ranks", "2", "--"], python),
        "accelerate": ([LAUNCH / "local.sh"], python | {"PROCESSES": "2"}),
    }
    weights = set()
    for name, (words, environment) in ways.items():
        done = command([*words, *flags, "--output", name], tmp_path, **environment)
        assert done.code == 0, done.err
        assert ("1 process on" if name == "one" else "2 processes on") in done.out
        weights.add((tmp_path / name / "checkpoints" / "latest" / "model.safetensors").read_bytes())
    assert len(weights) == 1


@pytest.mark.parametrize("file", sorted((LAUNCH / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_all_settings_of_its_files(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))  # raises for a setting that it does not know
    assert config.mixed_precision == "no" and config.num_processes >= 1
