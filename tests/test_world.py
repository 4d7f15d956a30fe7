from __future__ import annotations

from pathlib import Path

import pytest

from distcnn.errors import UserError
from distcnn.world import World, launched_alone_by_accelerate, read_world, wandb_key_present

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(3, 4, 1, 2, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 1, 2, 0)),  # nothing local said: all on one node
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World()),
        ({"RANK": "1"}, World()),  # a rank alone is no launcher
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3(x2)", "SLURM_NODEID": "1"}, World(5, 6, 2, 3, 1)),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,3", "SLURM_NODEID": "1"}, World(5, 6, 2, 3, 1)),
        ({**STEP, **TORCHRUN}, World(3, 4, 1, 2, 1)),  # torchrun inside an srun step
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, World()),  # a batch script: one process
        (
            {name: text for name, text in STEP.items() if name != "SLURM_STEP_ID"},
            World(),
        ),  # no step: left over from one
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World()),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, World()),  # an interactive step
    ],
)
def test_who_am_i(environ: dict[str, str], world: World) -> None:
    assert read_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**TORCHRUN, "RANK": "4"}, "contradict each other (RANK=4, WORLD_SIZE=4, "),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "rank 3 of 0"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "8 processes on node 1, but 4 in all"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' in the environment is not a number"),
        ({**TORCHRUN, "RANK": ""}, "RANK='' in the environment is not a number"),
        ({**TORCHRUN, "RANK": "²"}, "is not a number"),
        ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID='x' in the environment is not a number"),
    ],
)
def test_variables_that_contradict_each_other(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_world(environ)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "values", [(2, 2), (-1, 1), (0, 0), (0, 2, 2, 2), (0, 2, 0, 3), (0, 1, 0, 0), (0, 1, 0, 1, -1)]
)
def test_a_world_is_checked_at_birth(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        World(*values)


def test_only_rank_0_is_main() -> None:
    assert World(0, 2, 0, 2).is_main and not World(1, 2, 1, 2).is_main


@pytest.mark.parametrize(
    ("environ", "alone"),
    [
        ({}, False),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"ACCELERATE_USE_CPU": "false", "MASTER_ADDR": "127.0.0.1"}, False),
        ({"ACCELERATE_USE_CPU": "true"}, False),  # one process was asked for
        ({"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "RANK": "0"}, False),  # torchrun did start the others
        ({"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "PMI_RANK": "0"}, False),  # mpirun
    ],
)
def test_launched_alone(environ: dict[str, str], alone: bool) -> None:
    assert launched_alone_by_accelerate(environ) is alone


def test_wandb_key(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    here = {"NETRC": str(netrc)}
    assert not wandb_key_present(here)
    netrc.write_text("machine example.org login user password x\n")
    assert not wandb_key_present(here) and wandb_key_present({**here, "WANDB_BASE_URL": "http://example.org/x"})
    netrc.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_key_present(here)
    netrc.write_text("nonsense\n")
    assert not wandb_key_present(here)
    netrc.write_bytes(b"\xff\xfe")
    assert not wandb_key_present(here)
    assert wandb_key_present({**here, "WANDB_API_KEY": "k"}) and not wandb_key_present({**here, "WANDB_API_KEY": ""})
