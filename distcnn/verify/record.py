"""Looks on at a run from inside each of its processes, and writes down what it sees, a JSON object a line.

Tiles: which ids, which pixels reached the model, which labels. Steps: the gradient that the optimizer gets, the
learning rate, the weights and buffers before. Tensors are written as digests; those of a few steps as files, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch

from distcnn.augment import Augment, Targets
from distcnn.checkpoint import FOLDER
from distcnn.data.loader import Tile
from distcnn.job import Job

SAVE_SECONDS = 60.0  # that a checkpoint may take to be there before the kill


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 (hex, 32 digits) of the bits of tensors, in logical order whatever their strides are."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return state.hexdigest()[:32]


class Recorder:
    """Records into trace/rank-NNNN.jsonl. Lines go out at once, so that they outlive a kill."""

    def __init__(self, trace: Path, rank: int, keep: Iterable[int], kill_at: int) -> None:
        self._trace, self._rank, self._keep, self._kill_at = trace, rank, frozenset(keep), kill_at
        self._file = (trace / f"rank-{rank:04d}.jsonl").open("a", encoding="utf-8", buffering=1)
        self._seen = -1
        self._job: Job | None = None

    def row(self, kind: str, **facts: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **facts}) + "\n")

    def close(self) -> None:
        self._file.close()

    def __call__(self, job: Job) -> None:
        """Begin to look on at `job`: what `train` calls before the first step."""
        self._job = job
        self.row("start", pid=os.getpid(), size=job.runtime.world.size, total=job.position.total)
        augment = job.augment

        def watched(tile: Tile, device: torch.device, train: bool) -> tuple[torch.Tensor, Targets]:
            if train:
                self._before(job)
            x_NCHW, targets = augment(tile, device, train)
            if train:
                self._tile(tile, x_NCHW, targets)
            return x_NCHW, targets

        job.augment = cast(Augment, watched)
        inner: Any = getattr(job.optimizer, "optimizer", job.optimizer)  # Accelerate wraps it
        inner.register_step_pre_hook(lambda optimizer, args, kwargs: self._update(job, optimizer))

    def end(self) -> None:
        """The run is over: note the weights that it ends with."""
        assert self._job is not None
        self._state(self._job)
        self.row("end")

    def _before(self, job: Job) -> None:
        """The first tile of a step is about to come: the state is that after the step before."""
        total = job.position.total
        if total == self._seen:
            return
        self._seen = total
        if total == self._kill_at:
            self._kill(job)
        self._state(job)

    def _state(self, job: Job) -> None:
        total = job.position.total
        saved = job.model.state_dict().keys()
        buffers = {name: buffer for name, buffer in job.model.named_buffers() if name in saved}
        weights = dict(job.model.named_parameters())
        self.row("state", total=total, weights=digest(weights.values()), buffers=digest(buffers.values()))
        if self._rank == 0 and (total in self._keep or total - 1 in self._keep):
            self._save(f"state-{total}", {**weights, **buffers})

    def _tile(self, tile: Tile, x_NCHW: torch.Tensor, targets: Targets) -> None:
        request = tile.request
        empty = len(request.ids) == 1 and not bool(tile.weights.any())  # a blank image in place of none
        pixels = [] if empty else [digest([image])[:16] for image in x_NCHW]
        labels = torch.stack([targets.labels, targets.partner_labels], 1).tolist()
        self.row(
            "tile",
            epoch=request.epoch,
            step=request.step,
            lane=request.lane,
            ids=[] if empty else request.ids.tolist(),
            pixels=pixels,
            labels=[] if empty else labels,
            share=float(targets.share),
        )

    def _update(self, job: Job, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to step."""
        total = job.position.total
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in job.model.named_parameters()
            if p.requires_grad
        }
        finite = all(bool(torch.isfinite(g).all()) for g in gradients.values())
        lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.row("update", total=total, gradients=digest(gradients.values()), finite=finite, lr=max(lr))
        if self._rank == 0 and total in self._keep:
            self._save(f"gradients-{total}", gradients)

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        safetensors.torch.save_file(whole, self._trace / f"{name}.safetensors")

    def _kill(self, job: Job) -> None:
        """SIGKILL to this process, once the checkpoint that is under way is there to go on from."""
        every = job.config.run.checkpoint_every
        folder = job.run / FOLDER / f"step_{self._kill_at // every * every:08d}"
        deadline = time.monotonic() + SAVE_SECONDS
        while not folder.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.row("kill", total=self._kill_at)
        os.kill(os.getpid(), signal.SIGKILL)
