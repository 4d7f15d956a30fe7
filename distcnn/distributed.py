"""The only file that builds an Accelerator or talks to other processes.

`Runtime` is what a training run holds of them: the device, the wrapped model, sums over tiles and ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import nn
from torch._C._distributed_c10d import GradBucket, PrefixStore
from torch.distributed.rendezvous import rendezvous

from distcnn.config import RunConfig
from distcnn.errors import LostRank, UserError
from distcnn.kernels import choose_kernels
from distcnn.meeting import agree
from distcnn.optim import skip_unless
from distcnn.tree import BinaryCounter, tree_sum
from distcnn.world import World, agents_store, bound_processes

TIMEOUT_SECONDS = 900
MOST_PAIRED = 8  # ranks up to which pairs pass the whole sum on; see benchmarks/SCALING.md


class Runtime:
    """This process among the others, and the sums that they make together."""

    def __init__(self, config: RunConfig, world: World, threads: int) -> None:
        torch.set_num_threads(threads)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here (nvidia-smi tells whether the driver does)")
        self.world, self.tree = world, config.reduction == "tree"
        timeout = max(TIMEOUT_SECONDS, 2 * config.stall_timeout)  # the watchdog comes first: it knows names
        try:
            _begin_group(world, config, timeout)
            self.accelerator = accelerate.Accelerator(
                cpu=config.device == "cpu" or not torch.cuda.is_available(),
                mixed_precision=config.mixed_precision,
                # What `accelerate config` may hold besides must not change the run: nor steps, nor the model.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                dynamo_backend="no",
                kwargs_handlers=[
                    DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout)),
                ],
            )
        except (RuntimeError, TimeoutError) as error:
            raise _meeting_error(error, world) from error
        if self.accelerator.num_processes != world.size:
            raise UserError(
                f"{world.size} processes were started, but they did not find each other"
                " (srun alone does not do it): start with torchrun or 'accelerate launch'"
            )
        if self.accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise UserError(
                f"Accelerate's settings ask for {self.accelerator.distributed_type.value}; distcnn trains with DDP:"
                " start with torchrun, or 'accelerate launch' without a config file"
            )
        self.device = self.accelerator.device
        self._side: torch.cuda.Stream | None = None  # where gradients are summed beside the backward pass
        if self.device.type == "cuda":
            choose_kernels(exact=self.tree)
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        node = self._ranks_of_a_node()  # in pairs of nodes, all ranks of a node would send the same at once
        self._pairs = _pair_groups(world) if world.size <= MOST_PAIRED and node in (1, world.size) else []
        self._stages = [] if self._pairs else _stage_groups(world, node)
        self._gradients = BinaryCounter()
        self._extras = BinaryCounter()
        self._parameters: list[nn.Parameter] = []
        self._place: dict[int, int] = {}

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model in DDP and autocast, the optimizer with loss scaling, both by Accelerate."""
        with warnings.catch_warnings():
            # The name that torch 2.13 prefers is unknown to Accelerate, and to the oldest torch that we support.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # One process that torchrun has started would get DDP, too, whose buckets overwrite the gradients that the
            # tree keeps: `evaluation_mode` leaves DDP out, and nothing else.
            wrapped = self.accelerator.prepare_model(model, evaluation_mode=self.world.size == 1)
            prepared = self.accelerator.prepare(optimizer)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._place = {id(p): i for i, p in enumerate(self._parameters)}
        if self.tree and self.world.size > 1:
            # A lambda, since DDP compares annotations, which are strings here, with the types themselves.
            wrapped.register_comm_hook(self, lambda runtime, bucket: _tree_hook(runtime, bucket))
        return wrapped, prepared

    @contextlib.contextmanager
    def tile(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward of a tile: only the rank's last tile of a step talks to the other ranks."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Backward of a tile's share of the step's mean loss; after the last one, `.grad` is the sum over all tiles."""
        if not self.tree:
            self.accelerator.backward(loss * self.world.size)  # DDP divides by the number of ranks
            return
        self.accelerator.backward(loss)
        if last and self.world.size > 1:
            self._gradients.clear()  # the hook has added them
            return
        self._gradients.push(self._take_gradients())
        if last:
            for parameter, total in zip(self._parameters, self._gradients.total(), strict=True):
                parameter.grad = total

    def gradient_norm(self, limit: float) -> torch.Tensor:
        """The norm of the step's gradient, a scalar on the device; with `limit` > 0 the gradient is scaled to it."""
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if limit:
            nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        return norm

    def skip_unless(self, optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
        """Leave out the optimizer's next step unless `finite`. With loss scaling, that has its own way to do so."""
        if self.accelerator.scaler is None:
            skip_unless(optimizer, finite)

    def add(self, values: torch.Tensor) -> None:
        """Add (n,) float64 of a tile to the sums that `totals` returns."""
        self._extras.push([values])

    def totals(self) -> torch.Tensor:
        """(n,) float64: what `add` was given in this step, summed over all tiles of all ranks by the tree."""
        total = self._extras.total()[0].to(self.device)
        self._tree_all_reduce(total)
        return total

    def sum_with_gradient(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of (n,) `values` over the ranks, through which gradients flow back to all of them."""
        if self.world.size == 1:
            return values
        total: torch.Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
        return total

    def sum_integers(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """The element-wise sum over ranks, int64 modulo 2^64."""
        if self.world.size == 1:
            return values
        tensor = torch.from_numpy(values.copy()).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather_rows(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n_r, k) float64 of each rank, laid one after the other in the order of the ranks. Every rank gets all."""
        if self.world.size == 1:
            return rows
        counts = np.zeros(self.world.size, dtype=np.int64)
        counts[self.world.rank] = len(rows)
        counts = self.sum_integers(counts)
        longest = int(counts.max())
        mine = torch.zeros((longest, rows.shape[1]), dtype=torch.float64, device=self.device)
        mine[: len(rows)] = torch.from_numpy(rows)
        parts = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(parts, mine)
        return np.concatenate([part.cpu().numpy()[:count] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (of JSON types) on every rank. Also a barrier."""
        if self.world.size == 1:
            return value
        text = json.dumps(value).encode() if self.world.is_main else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, 0)
        body = torch.zeros(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.world.is_main:
            body.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(body, 0)
        return json.loads(bytes(body.cpu().numpy()))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world.size > 1:
            self.sum_integers(np.zeros(1, dtype=np.int64))

    def all_reduce_seconds(self, number: int, tree: bool) -> float:
        """Seconds that adding `number` bytes of float32 over all processes takes, the best of five."""
        values = torch.zeros(number // 4, device=self.device)
        best = float("inf")
        for _ in range(5):
            self.barrier()
            begun = time.perf_counter()
            if tree:
                self._tree_all_reduce(values)
            else:
                dist.all_reduce(values)
            values[:1].cpu()  # waits for the device
            best = min(best, time.perf_counter() - begun)
        return best

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _take_gradients(self) -> list[torch.Tensor]:
        """The tile's gradients, away from the parameters. A parameter that the loss did not reach has zeros."""
        gradients = []
        for parameter in self._parameters:
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return gradients

    def _tree_all_reduce(self, flat: torch.Tensor) -> None:
        """Sum (n,) over the ranks in place, by the tree.

        For a few ranks, a power of two: all-reduces between pairs, level by level (recursive doubling). A sum of two
        has one result whatever the backend does inside. Else: chunks go to their owners, each owner adds the R pieces
        by the tree, and the chunks come back: the bytes of a ring. On several nodes with a power of two of ranks each,
        first among the ranks of a node; the owners of a chunk then do likewise among the nodes.
        """
        if self.world.size == 1 or not flat.numel():
            return
        for group in self._pairs:
            dist.all_reduce(flat, group=group)
        if self._stages:
            _add_chunks(flat, self._stages)

    def _ranks_of_a_node(self) -> int:
        """How many ranks each node has, if that is a power of two on every node and they are in order; else 1."""
        mine = np.zeros((self.world.size, 2), dtype=np.int64)
        mine[self.world.rank] = self.world.local_size, self.world.local_rank
        every = self.sum_integers(mine)
        size = int(every[0, 0])
        alike = (every[:, 0] == size).all() and (every[:, 1] == np.arange(self.world.size) % size).all()
        return size if alike and not size & (size - 1) else 1


def broken_by_another(error: BaseException) -> bool:
    """Whether a collective operation has failed, as it does when another process of the group has gone."""
    texts = ("gloo", "NCCL", "Connection closed", "Connection reset")
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(text in str(error) for text in texts)
    )


def _begin_group(world: World, config: RunConfig, timeout_seconds: float) -> None:
    """Under torchrun, begin the process group that Accelerate would begin, but in a part of the store of its own.

    Nothing is done where a group stands already.
    """
    if world.size == 1 or dist.is_initialized() or not agents_store():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
    start = agree(store, world.rank, world.size, timeout_seconds)
    backend = "gloo" if config.device == "cpu" or not torch.cuda.is_available() else "nccl"
    dist.init_process_group(
        backend, store=PrefixStore(start, store), rank=world.rank, world_size=world.size, timeout=timeout
    )


def _meeting_error(error: Exception, world: World) -> Exception:
    """What to raise where the processes could not meet: what went wrong and what to do, from torch's own words."""
    text = str(error)
    port = re.search(r"port: (\d+)", text)
    if "EADDRINUSE" in text and port:
        return UserError(
            f"port {port[1]} is in use by another program or run: give another one"
            " (torchrun --master-port, accelerate launch --main_process_port, or MASTER_PORT)",
            world.is_main,
        )
    if isinstance(error, TimeoutError) or broken_by_another(error):
        reason = text.splitlines()[0]
        return LostRank(f"the processes did not meet: {reason} (have all been started, do they reach MASTER_ADDR?)")
    return error


class _Sum(torch.autograd.Function):
    """An all-reduce whose backward is an all-reduce, too."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _pair_groups(world: World) -> list[dist.ProcessGroup]:
    """This rank's partners, nearest level first: groups of two whose ranks differ in one bit. Empty if R is no 2^k."""
    if world.size & (world.size - 1):
        return []
    mine = []
    for level in range(world.size.bit_length() - 1):
        for low in (rank for rank in range(world.size) if not rank >> level & 1):
            group = dist.new_group([low, low | 1 << level])
            if world.rank in (low, low | 1 << level):
                mine.append(group)
    return mine


def _stage_groups(world: World, node: int) -> list[dist.ProcessGroup]:
    """This rank's groups, nearest first: the `node` ranks of its node, and those at its place on all nodes."""
    if node in (1, world.size):
        return [dist.group.WORLD] if world.size > 1 and dist.group.WORLD is not None else []
    sets = [range(first, first + node) for first in range(0, world.size, node)]
    sets += [range(place, world.size, node) for place in range(node)]
    made = [(ranks, dist.new_group(list(ranks))) for ranks in sets]
    return [group for ranks, group in made if world.rank in ranks]


def _add_chunks(flat: torch.Tensor, groups: list[dist.ProcessGroup]) -> None:
    """Sum (n,) over the ranks of the first group, then of the next, in place, each by the tree."""
    group, *others = groups
    ranks = dist.get_world_size(group)
    chunk = -(-flat.numel() // ranks)
    sent = nn.functional.pad(flat, (0, ranks * chunk - flat.numel()))
    pieces = torch.empty_like(sent)
    dist.all_to_all_single(pieces, sent, group=group)
    total = tree_sum(list(pieces.view(ranks, chunk)))
    if others:
        _add_chunks(total, others)
    dist.all_gather(list(sent.view(ranks, chunk)), total, group=group)
    flat.copy_(sent[: flat.numel()])


def _tree_hook(runtime: Runtime, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: add the rank's earlier tiles to the last one's gradients, then sum over the ranks."""
    flat, parameters = bucket.buffer(), bucket.parameters()
    gradients = _views(flat, parameters)
    places = [runtime._place[id(p)] for p in parameters]
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[flat.device] if flat.is_cuda else None)
    with contextlib.ExitStack() as stack:
        if flat.is_cuda:  # the backward pass goes on beside it; DDP waits for the future before the optimizer's step
            assert runtime._side is not None
            runtime._side.wait_stream(torch.cuda.current_stream(flat.device))
            stack.enter_context(torch.cuda.stream(runtime._side))
        for waiting in runtime._gradients.unfinished():
            torch._foreach_add_(gradients, [waiting[place] for place in places])
        runtime._tree_all_reduce(flat)
        future.set_result(flat)
    return future


def _views(flat: torch.Tensor, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients in a bucket as DDP lays them: one after the other, each with its parameter's own strides.

    (`bucket.gradients()` ignores the strides: with channels_last weights its elements are in another order.)
    """
    views, offset = [], flat.storage_offset()
    for parameter in parameters:
        views.append(flat.as_strided(parameter.size(), parameter.stride(), offset))
        offset += parameter.numel()
    return views


def tensorboard_tracker(folder: Path, **how: Any) -> Any:
    """Accelerate's tracker of TensorBoard, writing to `folder`; `how` goes to its SummaryWriter.

    It writes on rank 0 only, which it learns from Accelerate: so there must be a Runtime first.
    """
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(folder.name, folder.parent, **how)
    tracker.start()
    return tracker


def process_cores() -> int:
    """The cores that the processes of this node have together."""
    return len(os.sched_getaffinity(0)) * bound_processes()
