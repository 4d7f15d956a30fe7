"""All that the checks look at: configs, data, traces, the reference, and tensors that were kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import safetensors.torch
import torch

from distcnn.build import Dataset
from distcnn.config import TrainConfig
from distcnn.data.order import sample_of
from distcnn.verify.launch import Trace
from distcnn.verify.plan import exact
from distcnn.verify.reference import Reference
from distcnn.verify.result import few, plural


@dataclass
class Evidence:
    """`full` is the user's config, `config` the short one that was run, on `small`, with `steps` steps an epoch."""

    full: TrainConfig
    dataset: Dataset
    config: TrainConfig
    small: Dataset
    steps: int
    traces: dict[str, Trace]

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.config, self.small)

    @cached_property
    def compared(self) -> list[Trace]:
        """The runs that differ in nothing but the number of processes: 1, then the others."""
        return sorted((t for name, t in self.traces.items() if name.isdigit()), key=lambda trace: trace.processes)

    @property
    def one(self) -> Trace:
        return self.compared[0]

    def exact(self, trace: Trace) -> bool:
        """Whether this run promises the bits of the run with one process."""
        return exact(self.config, trace.processes)

    def rank_of(self, lane: int, processes: int) -> int:
        """The process that computes a lane."""
        geometry = self.config.geometry
        return next(r for r in range(processes) if lane in geometry.lanes_of(r, processes))

    def names(self, ids: list[int]) -> str:
        """Samples in words, with their keys."""
        reader = self.reference.loader.reader
        samples = sample_of(np.array(ids, dtype=np.int64))
        keys = [key for _, key in reader.keys(samples[:4])]
        named = [f"{sample} ({key})" for sample, key in zip(samples.tolist(), keys, strict=False)]
        return few(named + samples[4:].tolist())


def called(trace: Trace) -> str:
    """A run in words: 2 processes."""
    return plural(trace.processes, "process")


def troubles(traces: list[Trace]) -> list[str]:
    """A line for each run that ended before its time; why, `check_runs` says."""
    return [f"{described(trace)} did not come to its end" for trace in traces if trace.trouble]


def described(trace: Trace) -> str:
    """A run in words, with its purpose: the run with 1 process (resumed)."""
    purpose = "" if trace.run.name.isdigit() else f" ({trace.run.name})"
    return f"the run with {called(trace)}{purpose}"


def disagreement(trace: Trace, kind: str, what: str) -> str:
    """ "" if all processes of a run had the same digest `what` at every step, else who differs and from when on."""
    first = trace.by_step(kind)
    for rank in range(1, len(trace.ranks)):
        other = trace.by_step(kind, rank)
        for total in sorted(first.keys() & other.keys()):
            if first[total][what] != other[total][what]:
                return f"with {called(trace)} rank {rank} has other {what} than rank 0 at step {total}"
    return ""


def kept(trace: Trace, name: str) -> dict[str, torch.Tensor]:
    """Tensors that rank 0 of a run kept as a file, {} if it did not come so far."""
    file = trace.run.trace / f"{name}.safetensors"
    return safetensors.torch.load_file(file) if file.exists() else {}
