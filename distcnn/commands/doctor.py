"""Is this machine ready? GPUs, torch, cores, disks, W&B, SLURM, network: each line is ok, warn or fail with advice.

--processes N also starts N processes, as training would, and measures how fast they add their gradients.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from distcnn.errors import EXIT_FAILED, UserError

SECONDS = 120  # for the processes to find each other and add


@dataclass(frozen=True)
class Options:
    """What to look at."""

    data: Path = Path("data/digits")
    """Data set whose disk is measured"""
    output: Path = Path("runs")
    """Folder of the runs, whose disk is measured"""
    processes: int = 1
    """Processes that training would have on this machine; with more than one, an all-reduce is measured"""
    host: str = ""
    """NAME or NAME:PORT of the machine where the processes of several nodes shall meet"""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UserError(f"--processes {self.processes}: at least 1")


def run(options: Options) -> int:
    """Examine; 1 if something fails."""
    from distcnn.doctor import Question, examine
    from distcnn.world import read_world

    world = read_world()
    if world.size > 1:
        return _measure()
    worst = 0
    for finding in examine(Question(options.data, options.output, options.processes, options.host)):
        print(finding.line(), flush=True)
        worst = max(worst, int(finding.level == "fail"))
    if options.processes > 1:
        worst = max(worst, _start(options.processes))
    return EXIT_FAILED if worst else 0


def _measure() -> int:
    """One of the processes: add 64 MiB over all of them, and say how long it took."""
    from distcnn.config import RunConfig
    from distcnn.distributed import Runtime
    from distcnn.world import read_world

    runtime = Runtime(RunConfig(), read_world(), 1)
    try:
        number = 64 << 20
        times = {kind: runtime.all_reduce_seconds(number, kind == "tree") for kind in ("tree", "ddp")}
        if runtime.world.is_main:
            backend = "NCCL" if runtime.device.type == "cuda" else "gloo"
            speeds = [
                f"{kind} {seconds * 1000:.0f} ms ({number / seconds / 2**30:.2f} GiB/s)"
                for kind, seconds in times.items()
            ]
            print(f"ok    all-reduce   64 MiB over {runtime.world.size} processes with {backend}: {', '.join(speeds)}")
    finally:
        runtime.close()
    return 0


def _start(processes: int) -> int:
    """Start the processes with torchrun; 1 if they do not manage."""
    import subprocess

    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "distcnn", "doctor"]
    advice = "NCCL_DEBUG=INFO tells more; on several nodes also try --host"
    try:
        done = subprocess.run([sys.executable, *words], timeout=SECONDS, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        print(f"fail  all-reduce   {processes} processes did not add 64 MiB within {SECONDS} s: {advice}")
        return 1
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
        print(
            f"fail  all-reduce   {processes} processes could not add ({said[0] if said else done.returncode}): {advice}"
        )
        return 1
    print(done.stdout, end="")
    return 0
