"""`accelerate launch --cpu` itself is run in test_main.py; here is what is made of its command line."""

from __future__ import annotations

import pytest

from distcnn.config import from_flat
from distcnn.console import Console
from distcnn.errors import UserError
from distcnn.job import check_precision
from distcnn.launchers import forgotten_processes

ALONE = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environ", "parent", "processes"),
    [
        ({}, ["accelerate", "launch", "--num_processes", "4", "train.py"], 0),
        (ALONE, ["accelerate", "launch", "--cpu", "--num_processes", "4", "train.py"], 4),
        (ALONE, ["accelerate", "launch", "--cpu", "--num_processes=4", "train.py"], 4),
        (ALONE, ["accelerate", "launch", "--num-processes", "2", "train.py", "--seed", "3"], 2),
        (ALONE, ["accelerate", "launch", "--num-processes", "1", "train.py"], 0),
    ],
)
def test_how_many_were_asked_for(environ: dict[str, str], parent: list[str], processes: int) -> None:
    assert forgotten_processes(environ, parent) == processes


@pytest.mark.parametrize(
    "parent", [[], ["accelerate", "launch", "train.py"], ["--num_processes"], ["--num_processes", "x"]]
)
def test_a_number_that_cannot_be_found_is_said(parent: list[str]) -> None:
    with pytest.raises(UserError, match="give it --num_processes on the command line"):
        forgotten_processes(ALONE, parent)


@pytest.mark.parametrize(
    ("asked", "flag", "said"), [("bf16", "no", True), ("bf16", "bf16", False), ("no", "bf16", False)]
)
def test_a_precision_that_only_the_launcher_was_given_is_not_passed_over_in_silence(
    asked: str, flag: str, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    check_precision(from_flat({"mixed_precision": flag}), Console(True))
    told = " ".join(capsys.readouterr().err.split())
    assert (f"give --mixed-precision {asked} to train.py" in told) == said
