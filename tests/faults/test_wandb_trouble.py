"""Row 20, in the middle of things: a W&B server that fails, is silent or hangs up, from the start or while rows go out.

Training waits for none of it, one warning says so, the process ends, and the rows lie in the run folder.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from distcnn.runfolder import METRICS, read_rows
from tests import wandb_file
from tests.support import clean_environment, command, python
from tests.test_wandb_online import train
from tests.wandb_server import How, Server, serving

INIT, FINISH, MORE = 10.0, 20.0, 30.0  # seconds: for W&B to begin, to end, and for all else on a busy machine
# `distcnn` with less patience than it has, so that the test is short.
HASTY = (
    f"import sys; from distcnn import tracking; tracking.INIT_SECONDS, tracking.FINISH_SECONDS = {INIT}, {FINISH}\n"
    "from distcnn.cli import main; sys.exit(main(sys.argv[1:]))"
)


def run_beside(server: Server, words: list[str | Path], folder: Path) -> tuple[float, float, list[str]]:
    """(seconds until results.json, until the end, warnings) of a training run that must be well."""
    begun = time.monotonic()
    environment = clean_environment(HOME=str(folder / "home"), **server.environment)
    with (folder / "err").open("w+") as err:
        process = subprocess.Popen(
            [str(word) for word in words], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=err
        )
        try:
            while not (folder / "run" / "results.json").exists():
                assert process.poll() is None and time.monotonic() - begun < 120
                time.sleep(0.02)
            trained = time.monotonic() - begun
            assert process.wait(INIT + FINISH + MORE) == 0
        finally:
            process.kill()
            process.wait()
        err.seek(0)
        said = [line for line in err.read().splitlines() if line.startswith("warning")]
    return trained, time.monotonic() - begun, said


@pytest.mark.parametrize(
    ("how", "streaming", "says"),
    [
        ("fails", "fails", "W&B does not answer ("),
        ("hangs", "hangs", "W&B does not answer ("),
        pytest.param("drops", "drops", "W&B does not answer (", marks=pytest.mark.long),
        pytest.param("well", "fails", "W&B did not finish within 20 s; ", marks=pytest.mark.long),
        ("well", "hangs", "W&B did not finish within 20 s; "),
        pytest.param("well", "drops", "W&B did not finish within 20 s; ", marks=pytest.mark.long),
    ],
)
def test_trouble(how: How, streaming: How, says: str, stripes_set: Path, tmp_path: Path) -> None:
    words = python("-c", HASTY, *train(stripes_set, tmp_path / "run")[3:])
    with serving(how, streaming) as server:
        _, ended, said = run_beside(server, words, tmp_path)
        assert "RunResumeStatus" in server.arrived.asked, "wandb must have tried, or this proves nothing"
        assert server.arrived.rows() == []
    assert len(said) == 1 and said[0].startswith(f"warning: {says}"), said
    assert "wandb sync --include-online " in said[0]
    assert ended < INIT + FINISH + MORE
    rows = read_rows(tmp_path / "run" / METRICS)
    (folder,) = (path for path in (tmp_path / "run" / "wandb").glob("*run-*") if rows_in(path))
    assert len(rows) == 8 and rows_in(folder) == rows, "for 'wandb sync'"


def rows_in(folder: Path) -> list[dict[str, object]]:
    return wandb_file.rows(wandb_file.records(folder)) if list(folder.glob("*.wandb")) else []


def test_training_does_not_wait_for_wandb_to_begin(stripes_set: Path, tmp_path: Path) -> None:
    """It is over while W&B's first question is still open, and would be for longer than the training takes."""
    words = python("-c", HASTY.replace(str(INIT), "60.0"), *train(stripes_set, tmp_path / "run")[3:])
    with serving("hangs") as server:
        begun = time.monotonic()
        environment = clean_environment(HOME=str(tmp_path / "home"), **server.environment)
        process = subprocess.Popen(
            [str(word) for word in words], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
        )
        try:
            while not (tmp_path / "run" / "results.json").exists():
                assert process.poll() is None and time.monotonic() - begun < 50, "it waited for W&B"
                time.sleep(0.05)
            assert "RunResumeStatus" in server.arrived.asked
        finally:
            process.kill()
            process.wait()


def test_a_server_that_goes_away_and_comes_back_has_all_rows(stripes_set: Path, tmp_path: Path) -> None:
    """By the command that the warning names."""
    words = python("-c", HASTY.replace(str(FINISH), "3.0"), *train(stripes_set, tmp_path / "run")[3:])
    with serving("well", "drops") as server:
        (said,) = run_beside(server, words, tmp_path)[2]
    assert " uploads the rest" in said
    with serving() as server:
        shell = ["bash", "-c", f'PATH="{Path(words[0]).parent}:$PATH" && {said.split(chr(39))[1]}']
        done = command(shell, tmp_path, HOME=str(tmp_path / "home"), **server.environment)
        assert server.arrived.rows() == read_rows(tmp_path / "run" / METRICS), done.out + done.err
