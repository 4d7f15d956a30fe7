"""Several runs, one after the other, in the same processes: `torchrun ... -m tests.verify.many LIST.json`.

Starting a process takes seconds, these runs do not. The process group lives through all of them; everything else of
a run is made anew. An entry of the list: {"spec": the file of a distcnn.verify.plan.Run, "mutant": "" or a name,
"float64": whether to compute in float64, "stop_at": -1 or the step in which rank 1 (of one: 0) is asked to stop}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from distcnn import distributed
from distcnn.config import load_toml
from distcnn.distributed import Runtime
from distcnn.job import Job
from distcnn.preempt import Preempted
from distcnn.train import train
from distcnn.verify.record import Recorder
from distcnn.world import World, read_world
from tests.verify.mutants import applied


def run(entry: dict[str, Any], world: World) -> None:
    spec = json.loads(Path(entry["spec"]).read_text())
    recorder = Recorder(Path(spec["trace"]), world.rank, spec["keep"], spec["kill_at"])

    def watch(job: Job) -> None:
        if entry["float64"]:
            job.model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
        if entry["stop_at"] >= 0 and world.rank == min(1, world.size - 1):
            job.model.register_forward_pre_hook(lambda *_: ask_to_stop(job, entry["stop_at"]))
        recorder(job)

    torch.set_default_dtype(torch.float64 if entry["float64"] else torch.float32)
    try:
        train(load_toml(Path(spec["config"])), world, watch)
        recorder.end()
    except Preempted:
        recorder.row("end")
    except Exception as error:
        traceback.print_exc()
        recorder.row("error", text=f"{type(error).__name__}: {error}", user=False)
    finally:
        recorder.close()


def ask_to_stop(job: Job, step: int) -> None:
    if job.position.total == step:
        os.kill(os.getpid(), signal.SIGUSR1)


def main(path: Path) -> None:
    world = read_world()
    begin = distributed._begin_group
    distributed._begin_group = lambda *arguments: None if dist.is_initialized() else begin(*arguments)
    Runtime.close = lambda runtime: None  # type: ignore[method-assign]
    for entry in json.loads(path.read_text()):
        AcceleratorState._reset_state()
        with applied(entry["mutant"], world):
            run(entry, world)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
