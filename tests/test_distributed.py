"""What a Runtime is in one process; several are tested in multiprocess/."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from distcnn.config import RunConfig
from distcnn.distributed import Runtime, _views
from distcnn.errors import UserError
from distcnn.world import World

CPU = RunConfig(device="cpu")


def test_alone_every_sum_is_its_own() -> None:
    runtime = Runtime(CPU, World(), threads=1)
    assert runtime.sum_integers(np.array([3, -4])).tolist() == [3, -4]
    assert runtime.gather_rows(np.ones((2, 3))).tolist() == [[1, 1, 1]] * 2
    assert runtime.broadcast({"a": [1]}) == {"a": [1]}
    runtime.barrier()
    runtime.add(torch.tensor([1.0, 2.0], dtype=torch.float64))
    runtime.add(torch.tensor([10.0, 20.0], dtype=torch.float64))
    assert runtime.totals().tolist() == [11, 22]
    runtime.close()


@pytest.mark.parametrize("limit", [0.0, 1.0, 100.0])
def test_gradients_add_up_over_tiles_and_are_clipped_by_their_norm(limit: float) -> None:
    runtime = Runtime(CPU, World(), threads=1)
    model = nn.Linear(2, 1, bias=False)
    unused = nn.Parameter(torch.ones(1))  # the loss does not reach it
    model.register_parameter("unused", unused)
    wrapped, _ = runtime.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for last, x in ((False, [3.0, 0.0]), (False, [0.0, 2.0]), (True, [0.0, 2.0])):
        with runtime.tile(wrapped, last):
            runtime.backward(wrapped(torch.tensor([x])).sum(), last)
    norm = runtime.gradient_norm(limit)
    assert norm == 5
    scale = min(1.0, limit / 5) if limit else 1.0
    assert model.weight.grad is not None and model.weight.grad.flatten().tolist() == pytest.approx(
        [3 * scale, 4 * scale]
    )
    assert unused.grad is not None and unused.grad.item() == 0


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_views_of_a_bucket_have_the_strides_of_their_parameters(order: torch.memory_format) -> None:
    shapes = [(4, 3, 3, 3), (4,), (5, 4)]
    parameters = [
        torch.arange(float(np.prod(shape))).reshape(shape).contiguous(memory_format=order)
        if len(shape) == 4
        else torch.rand(shape)
        for shape in shapes
    ]
    buffer = torch.zeros(7 + sum(p.numel() for p in parameters))
    flat, offset = buffer[7:], 0  # a bucket may begin within a storage
    for p in parameters:  # as DDP lays them: the memory of each, as it is
        flat[offset : offset + p.numel()] = torch.as_strided(p, (p.numel(),), (1,))
        offset += p.numel()
    for view, p in zip(_views(flat, parameters), parameters, strict=True):
        assert torch.equal(view, p) and view.stride() == p.stride()
        view.zero_()
    assert not flat.any()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate reads its settings once a process."""
    forget()
    yield
    forget()


def forget() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_accelerates_config_file_holds_besides_does_not_change_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` hands on its settings in the environment."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = Runtime(CPU, World(), threads=1).accelerator
    assert found.gradient_accumulation_steps == 1 and found.mixed_precision == "no"
    assert found.state.dynamo_plugin.backend.value == "NO"


def test_processes_that_no_launcher_joined_are_told_so() -> None:
    """srun sets ranks, but nobody says where to meet: not two runs of one process each over the same folder."""
    with pytest.raises(UserError, match="2 processes were started, but they did not find each other"):
        Runtime(CPU, World(0, 2, 0, 2), threads=1)
