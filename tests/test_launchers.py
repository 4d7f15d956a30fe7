"""`accelerate launch --cpu` itself is run in test_main.py; here is what is made of its command line."""

from __future__ import annotations

import pytest

from distcnn.errors import UserError
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
