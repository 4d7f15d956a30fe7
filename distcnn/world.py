"""Who am I among the processes: read once from torchrun's, accelerate's or SLURM's variables, then passed in.

All names of environment variables that the package reads stand in this file. No torch here.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distcnn.errors import UserError


@dataclass(frozen=True)
class World:
    """One process of `size`. Ranks count from 0; `local_*` are within the node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: ranks go from 0 to size - 1")
        if self.local_size < 1 or not 0 <= self.local_rank < self.local_size:
            raise ValueError(f"local rank {self.local_rank} of {self.local_size}")
        if self.local_size > self.size or self.node < 0:
            raise ValueError(f"{self.local_size} processes on node {self.node}, but {self.size} in all")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


TORCHRUN = {
    "rank": "RANK",
    "size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_size": "LOCAL_WORLD_SIZE",
    "node": "GROUP_RANK",
}
SRUN = {
    "rank": "SLURM_PROCID",
    "size": "SLURM_STEP_NUM_TASKS",
    "local_rank": "SLURM_LOCALID",
    "local_size": "SLURM_STEP_TASKS_PER_NODE",
    "node": "SLURM_NODEID",
}

MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def read_world(environ: Mapping[str, str] | None = None) -> World:
    """The World of this process, from torchrun's or `accelerate launch`'s variables, else from those of an srun step.

    In a batch script or an salloc shell SLURM sets SLURM_NTASKS too, though one process runs: only inside an srun
    step (SLURM_STEP_ID) are its variables believed. Raises UserError for variables that contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = TORCHRUN
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = SRUN
    else:
        return World()
    read = {field: _integer(env, name) for field, name in names.items()}
    size, rank = read["size"], read["rank"]
    local_rank = read["local_rank"]
    try:
        return World(
            rank=0 if rank is None else rank,
            size=1 if size is None else size,
            local_rank=(rank or 0) if local_rank is None else local_rank,
            local_size=read["local_size"] or (size or 1),
            node=read["node"] or 0,
        )
    except ValueError as error:
        seen = ", ".join(f"{name}={env[name]}" for name in names.values() if name in env)
        raise UserError(f"the launcher's variables contradict each other ({seen}): {error}") from error


def torchrun_restarts(environ: Mapping[str, str] | None = None) -> int:
    """How often torchrun has restarted the processes of this job."""
    return int((os.environ if environ is None else environ).get("TORCHELASTIC_RESTART_COUNT", "0"))


def bound_processes(environ: Mapping[str, str] | None = None) -> int:
    """How many processes of this node launch/worker.sh gave a share of the cores each; 1 if they have not been shared.

    Raises UserError for a value that is no number.
    """
    return _integer(os.environ if environ is None else environ, "DISTCNN_BOUND") or 1


def launched_by_torchrun(environ: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun (or `accelerate launch`, which runs it) started this process."""
    return "TORCHELASTIC_RUN_ID" in (os.environ if environ is None else environ)


def agents_store(environ: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun itself holds the store by which the processes meet."""
    return (os.environ if environ is None else environ).get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launched_alone_by_accelerate(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `accelerate launch` was asked for several processes on the CPU, but started this one only.

    It then sets where the processes should meet (MASTER_ADDR), but no rank.
    """
    env = os.environ if environ is None else environ
    on_cpu = env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return on_cpu and "MASTER_ADDR" in env and not any(name in env for name in ("RANK", *MPI_RANKS))


def accelerates_precision(environ: Mapping[str, str] | None = None) -> str:
    """What `accelerate launch --mixed_precision` or its config file asked for: no, fp16, bf16, fp8; "" if nothing."""
    return (os.environ if environ is None else environ).get("ACCELERATE_MIXED_PRECISION", "")


def _integer(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if text is None:
        return None
    digits = text.split("(")[0].split(",")[0]  # SLURM writes "2(x3)" for 2 tasks on each of 3 nodes
    if not digits.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is not a number; start with torchrun, accelerate or srun")
    return int(digits)


def fix_cublas_workspace() -> None:
    """Let cuBLAS add in one order whatever else runs on the GPU, unless the variable is set already.

    It must be set before the process first uses cuBLAS (NVIDIA, cuBLAS documentation, "Results reproducibility").
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def wandb_url(environ: Mapping[str, str] | None = None) -> str:
    """Where W&B's server is."""
    return (os.environ if environ is None else environ).get("WANDB_BASE_URL", "https://api.wandb.ai")


def wandb_run_id(environ: Mapping[str, str] | None = None) -> str:
    """The id that a sweep's agent, or a person, wants the run to have; "" if none."""
    return (os.environ if environ is None else environ).get("WANDB_RUN_ID", "")


def keep_wandb_files_in(folder: Path) -> None:
    """Let W&B stage the files of tables and artifacts in `folder`, unless WANDB_DATA_DIR names a place already.

    Else they go to the home folder, where those of an offline run stay for ever and are missed on another machine.
    """
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.absolute()))


def wandb_takes_models(environ: Mapping[str, str] | None = None) -> bool:
    """Whether checkpoints go to W&B at the end of a run; WANDB_LOG_MODEL=false keeps them here."""
    value = (os.environ if environ is None else environ).get("WANDB_LOG_MODEL", "")
    return value.lower() not in ("false", "0", "no")


def tensorboard_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether metrics go to TensorBoard, too: DISTCNN_TENSORBOARD=1."""
    value = (os.environ if environ is None else environ).get("DISTCNN_TENSORBOARD", "")
    return value.lower() not in ("", "false", "0", "no")


def wandb_key_present(environ: Mapping[str, str] | None = None) -> bool:
    """Whether W&B could log in without asking: a key in the environment, or an entry in ~/.netrc."""
    env = os.environ if environ is None else environ
    if env.get("WANDB_API_KEY"):
        return True
    try:
        host = wandb_url(env).split("://")[-1].split("/")[0]
        return netrc.netrc(env.get("NETRC") or str(Path.home() / ".netrc")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
