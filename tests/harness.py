"""R ranks in one process, without a process group.

Each rank is a thread that runs the trainer's own code; only what the ranks say to each other is replaced: they meet
in a list, and sums over ranks are made by distcnn.tree. One rank runs at a time, and the turn passes where ranks
would wait for each other, so nothing depends on timing and torch's global generator is never shared.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distcnn import checkpoint
from distcnn.build import open_dataset
from distcnn.config import RunConfig, TrainConfig, from_flat
from distcnn.console import Console
from distcnn.distributed import Runtime, _tree_hook
from distcnn.job import Job, begin_tracking, build_job, check_lanes, claim_run, is_over, restore
from distcnn.preempt import StopRequest
from distcnn.results import report_known
from distcnn.runfolder import LEDGER, METRICS, read_rows
from distcnn.train import run_epochs
from distcnn.tree import BinaryCounter, tree_sum
from distcnn.world import World

TURN_SECONDS = 60


class Meeting:
    """Where `size` ranks exchange values. A rank runs only while it has the turn."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._turn = 0
        self._failed: BaseException | None = None
        self._met = [0] * size  # how often each rank has exchanged
        self._values: dict[int, list[tuple[str, Any]]] = {}
        self._combined: Any = None

    def exchange(self, rank: int, what: str, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """`combine` of all ranks' values, in rank order. All ask for the same things in the same order."""
        number = self._met[rank]
        self._met[rank] += 1
        self._values.setdefault(number, []).append((what, value))
        self._pass(rank)
        found = self._values[number]
        assert len(found) == self.size and len({kind for kind, _ in found}) == 1, f"ranks asked for {found}"
        if rank == 0:  # the first to have the turn again
            self._combined = combine([value for _, value in found])
        if rank == self.size - 1:
            del self._values[number]
        return self._combined

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` of every rank; their results. Raises what the first of them raised."""
        results: list[Any] = [None] * self.size

        def begin(rank: int) -> None:
            try:
                self._wait(rank)
                results[rank] = work(rank)
                with self._changed:
                    self._turn = rank + 1
                    self._changed.notify_all()
            except BaseException as error:
                with self._changed:
                    self._failed = self._failed or error
                    self._changed.notify_all()

        threads = [threading.Thread(target=begin, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed:
            raise self._failed
        return results

    def _pass(self, rank: int) -> None:
        with self._changed:
            self._turn = (rank + 1) % self.size
            self._changed.notify_all()
        self._wait(rank)

    def _wait(self, rank: int) -> None:
        with self._changed:
            came = self._changed.wait_for(lambda: self._turn == rank or self._failed is not None, TURN_SECONDS)
        assert came, f"rank {rank} waited {TURN_SECONDS} s: the others are not where it is"
        if self._failed:
            raise SystemExit


@dataclass
class Bucket:
    """What DDP hands to a communication hook: gradients laid one after the other, each with its parameter's strides."""

    flat: torch.Tensor
    members: list[nn.Parameter]

    def buffer(self) -> torch.Tensor:
        return self.flat

    def parameters(self) -> list[nn.Parameter]:
        return self.members


class SimulatedRuntime(Runtime):
    """A Runtime whose other ranks are threads. The sums over tiles and DDP's hook are the real ones."""

    BUCKET = 3  # parameters

    def __init__(self, world: World, meeting: Meeting, config: RunConfig) -> None:
        torch.set_num_threads(1)
        self.world, self.tree, self._meeting = world, config.reduction == "tree", meeting
        self.accelerator = accelerate.Accelerator(cpu=True)
        self.device = torch.device("cpu")
        self._gradients, self._extras = BinaryCounter(), BinaryCounter()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._place = {id(p): place for place, p in enumerate(self._parameters)}
        return model, self.accelerator.prepare(optimizer)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if not last or self.world.size == 1:
            super().backward(loss, last)
            return
        loss.backward()
        backwards = list(reversed(self._parameters))  # as DDP does: the last layer's gradients are ready first
        for start in range(0, len(backwards), self.BUCKET):
            self._reduce(backwards[start : start + self.BUCKET])
        self._gradients.clear()

    def _reduce(self, members: list[nn.Parameter]) -> None:
        flat, offset = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype), 0
        for p in members:
            view = flat.as_strided(p.size(), p.stride(), offset)
            if p.grad is not None:
                view.copy_(p.grad)
            p.grad = view
            offset += p.numel()
        _tree_hook(self, Bucket(flat, members))

    def _tree_all_reduce(self, flat: torch.Tensor) -> None:
        flat.copy_(self._meet("tree", flat.clone(), tree_sum))

    def sum_integers(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        with np.errstate(over="ignore"):
            total: NDArray[np.int64] = self._meet("integers", values, lambda all_: np.sum(all_, axis=0, dtype=np.int64))
        return total.copy()

    def gather_rows(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        gathered: NDArray[np.float64] = self._meet("rows", rows, np.concatenate)
        return gathered.copy()

    def broadcast(self, value: Any) -> Any:
        return self._meet("broadcast", value, lambda all_: all_[0])

    def close(self) -> None:
        """There is no process group."""

    def _meet(self, what: str, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        return self._meeting.exchange(self.world.rank, what, value, combine)


def simulate(config: TrainConfig, ranks: int, on_job: Callable[[Job], None] = lambda job: None) -> dict[str, Any]:
    """Train as `ranks` processes would; what rank 0 returns. `on_job` sees every rank's job before it begins."""
    meeting = Meeting(ranks)

    def work(rank: int) -> dict[str, Any]:
        world = World(rank, ranks, rank, ranks)
        console = Console(speaks=False)
        dataset = open_dataset(config, world)
        check_lanes(config, world, console)
        runtime = SimulatedRuntime(world, meeting, config.run)
        resume_from = claim_run(config, runtime, console)
        stop = StopRequest(config.output, looks_for_file=False)  # not entered: no handlers of signals
        job = build_job(config, dataset, runtime, console, stop, resumed=resume_from is not None)
        on_job(job)
        restore(job, resume_from)
        if is_over(job) and (known := report_known(job)):
            return known
        begin_tracking(job, resume_from)
        return run_epochs(job, time.monotonic())

    result: dict[str, Any] = meeting.run(work)[0]
    return result


def small_config(data: Path, output: Path, **values: Any) -> TrainConfig:
    """Two epochs of a tiny CNN with everything on that is random or averaged, on 8 lanes of 4."""
    settings: dict[str, Any] = {
        "data": str(data),
        "output": str(output),
        "device": "cpu",
        "threads": 1,
        "decode_threads": 1,
        "wandb_mode": "disabled",
        "quiet": True,
        "epochs": 2,
        "global_batch_size": 32,
        "tile_size": 4,
        "channels": [6, 8],
        "hidden": 16,
        "dropout": 0.2,
        "flip": "random",
        "crop": "pad",
        "mixup": 0.3,
        "cutmix": 0.5,
        "label_smoothing": 0.1,
        "ema_decay": 0.9,
        "clip_grad_norm": 1.0,
        "log_every": 1,
        "keep_checkpoints": 99,
    }
    return from_flat(settings | values)


def digest_of(value: Any) -> str:
    """sha256 (hex) over nested dicts, lists and tensors: equal only if every bit is."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for name in sorted(part, key=str):
                digest.update(repr(name).encode())
                add(part[name])
        elif isinstance(part, list | tuple):
            for inner in part:
                add(inner)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


@dataclass(frozen=True)
class Trace:
    """All that must not depend on how a run was made: digests by step, and rows without times."""

    weights: dict[int, str]  # step -> model, averaged weights, optimizer and what else training needs
    metrics: list[dict[str, Any]]
    ledger: list[dict[str, Any]]


def trace_of(run: Path) -> Trace:
    """The trace that a run folder holds."""
    weights = {}
    for path in (run / checkpoint.FOLDER).glob("step_*"):
        saved = checkpoint.load(path)
        weights[checkpoint.step_of(path)] = digest_of([saved.model, saved.ema, saved.trainer])
    metrics = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_rows(run / METRICS)]
    return Trace(weights, metrics, read_rows(run / LEDGER))
