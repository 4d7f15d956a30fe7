"""`distcnn verify` from the command line, with its own processes; and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distcnn.cli import main
from tests.support import ROOT, clean_environment

MUTATED = Path(__file__).parent / "mutated"


@pytest.fixture
def flags(stripes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = ["--channels", "8", "--hidden", "0", "--global-batch-size", "16", "--tile-size", "4", "--lr", "0.02"]
    return ["verify", "--data", str(stripes_set), "--output", str(tmp_path / "out"), *small]


def test_kill_and_resume_precision_overfitting(flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Two real processes are killed with SIGKILL in the middle of an epoch, one goes on."""
    only = ["resume", "precision", "overfit", "finite"]
    assert main([*flags, "--processes", "1,2", "--only", *only]) == 0, capfd.readouterr().out
    out = capfd.readouterr().out
    assert "all 4 checks passed, on 1 and 2 processes" in out and "certificate.html" in out
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert list(checks) == ["runs", *only] and {check["verdict"] for check in checks.values()} == {"pass"}
    assert "2 processes killed in step 3, went on from step 2 with 1" in checks["resume"]["measured"]
    assert checks["resume"]["figures"] == {"weights": 0.0, "killed_in_step": 3, "resumed_at_step": 2}
    assert 0 < checks["precision"]["figures"]["first"] < 0.05, "bf16 is another run, and close"
    assert {run["name"]: run["processes"] for run in report["runs"]} == {
        "1": 1,
        "killed": 2,
        "resumed": 1,
        "precision": 1,
        "overfit": 1,
    }
    page = (tmp_path / "out" / "certificate.html").read_text()
    assert "Passed" in page and "The same run" not in page, "not all of it was checked"
    assert "://" not in page, "it needs nothing else"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["certificate.html", "verify.json"]


def test_a_fault_in_all_processes_fails(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(MUTATED), str(ROOT)]))
    monkeypatch.setenv("DISTCNN_MUTANT", "drops_a_rank")
    assert main([*flags, "--steps", "2", "--processes", "1,2", "--only", "gradients"]) == 1
    out = capfd.readouterr().out
    assert "1 check of 1 failed: gradients of 1 and more processes" in out
    assert "rank 1 (lanes 2 to 3) did not enter the sum" in out
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert report["passed"] is False and report["checks"][1]["verdict"] == "fail"
    assert "Not the same run" in (tmp_path / "out" / "certificate.html").read_text()
    assert (tmp_path / "out" / "work" / "2" / "rank-0001.jsonl").exists(), "the traces stay, to look into"


def refusal(flags: list[str], capfd: pytest.CaptureFixture) -> str:
    """The line with which a command is refused."""
    assert main(flags) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("distcnn verify: error: "), lines
    return lines[0].removeprefix("distcnn verify: error: ")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--processes", "1,two"], "--processes 1,two: give numbers with commas"),
        (["--processes", "0"], "--processes 0: must be >= 1"),
        (["--processes", "8"], "8 processes, but only 4 lanes"),
        (["--steps", "0"], "--steps 0: must be >= 1"),
        (["--batch-norm", "sync"], "--batch-norm sync: its statistics depend on the processes"),
        (["--only", "ordr"], "order"),
        (["--data", "nowhere"], "no dataset.json in nowhere"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_refused_before_anything_runs(
    more: list[str], words: str, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert words in refusal([*flags, *more], capfd)
    assert not (tmp_path / "out").exists()


def test_refused_in_a_folder_of_something_else(flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "holds files of something else (thesis.tex)" in refusal(flags, capfd)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_refused_under_a_launcher(
    flags: list[str], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "it starts the processes itself" in refusal(flags, capfd)


def test_a_model_that_cannot_be_built_is_the_users_error(flags: list[str], capfd: pytest.CaptureFixture) -> None:
    line = refusal([*flags, "--model", "resnet180", "--processes", "1", "--only", "finite"], capfd)
    assert "resnet180" in line and "resnet18" in line
