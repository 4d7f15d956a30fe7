"""Runs on one GPU: the same twice over, resumed, near the CPU's, and carried from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from distcnn import checkpoint, load_model
from distcnn import train as training
from distcnn.build import make_augment, make_loader, open_dataset
from distcnn.config import RunConfig
from distcnn.distributed import Runtime
from distcnn.evaluate import evaluate
from distcnn.runfolder import METRICS, read_rows
from distcnn.world import World
from tests.gpu.support import DEVICE, PRECISIONS, begin, begin_and_die, gpu_config, losses, run
from tests.harness import small_config, trace_of
from tests.support import command, python

EVERYTHING: dict[str, Any] = {
    "checkpoint_every": 1,
    "augment": ["trivial-augment", "color-jitter=0.4", "erasing=0.5", "cutout=4"],
}
RESNET: dict[str, Any] = {"model": "resnet18", "optimizer": "sgd", "epochs": 1, "checkpoint_every": 1}
RESNET9: dict[str, Any] = {**RESNET, "model": "resnet9", "channels": [8, 8, 16, 16], "optimizer": "muon"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("values", [EVERYTHING, RESNET, RESNET9], ids=["cnn", "resnet18", "resnet9"])
def test_a_run_equals_itself_to_the_last_bit(
    values: dict[str, Any], precision: str, stripes_set: Path, tmp_path: Path
) -> None:
    """A kernel that adds in no fixed order would make torch warn, and a warning is an error here."""
    first, second = (run(stripes_set, tmp_path / name, mixed_precision=precision, **values) for name in "ab")
    assert first == second and len(first.weights) >= 3
    assert all(row["exactly_once"] for row in first.ledger)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("step", [2, 5])
def test_a_run_resumed_equals_one_that_was_not_interrupted(
    step: int, precision: str, stripes_set: Path, tmp_path: Path
) -> None:
    values = {**EVERYTHING, "mixed_precision": precision}
    expected = run(stripes_set, tmp_path / "whole", **values)
    config = gpu_config(stripes_set, tmp_path / "cut", **values)
    begin_and_die(config, step)
    begin(config)
    assert trace_of(tmp_path / "cut") == expected


def test_the_first_steps_loss_is_the_cpus(exact_products: None, stripes_set: Path, tmp_path: Path) -> None:
    """Without dropout, whose draws are another device's."""
    values = {"dropout": 0.0, "epochs": 1}
    run(stripes_set, tmp_path / "gpu", **values)
    begin(small_config(stripes_set, tmp_path / "cpu", **values))
    gpu, cpu = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert gpu[0] == pytest.approx(cpu[0], rel=1e-5)
    assert gpu == pytest.approx(cpu, rel=1e-3), "and then rounding grows"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_full(precision: str, stripes_set: Path, tmp_path: Path) -> None:
    run(stripes_set, tmp_path / "half", mixed_precision=precision, epochs=1)
    run(stripes_set, tmp_path / "full", epochs=1)
    half, full = losses(tmp_path / "half"), losses(tmp_path / "full")
    assert half != full and half[0] == pytest.approx(full[0], rel=0.02)


def test_an_evaluation_has_the_cpus_numbers(exact_products: None, stripes_set: Path, tmp_path: Path) -> None:
    config = gpu_config(stripes_set, tmp_path / "run", epochs=2)
    begin(config)
    dataset = open_dataset(config, World())
    found = []
    for name in (DEVICE, "cpu"):
        AcceleratorState._reset_state(reset_partial_state=True)
        runtime = Runtime(RunConfig(device=name), World(), 1)  # type: ignore[arg-type]
        assert runtime.device.type == name
        loader = make_loader(config, dataset, "val", False, 2, ahead=True, device=runtime.device)
        model = load_model(config.output, device=name).model
        found.append(evaluate(runtime, model, loader, make_augment(config, dataset), 8, dataset.classes))
        loader.close()
    gpu, cpu = found
    assert gpu is not None and cpu is not None
    assert np.array_equal(gpu.rows[:, :3], cpu.rows[:, :3]), "each sample once, the same label and prediction"
    assert gpu.summary() == pytest.approx(cpu.summary(), rel=1e-4)


def test_a_step_that_is_not_finite_is_left_out(
    stripes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a wait: the device itself decides. The host learns of it two steps later, and writes the black box."""
    step, loss = training.train_step, training.loss_sum

    def poisoned(job: Any, *others: Any) -> Any:
        with monkeypatch.context() as patch:
            if job.position.total == 1:
                patch.setattr(training, "loss_sum", lambda *given: loss(*given) * float("nan"))
            return step(job, *others)

    monkeypatch.setattr(training, "train_step", poisoned)
    run(stripes_set, tmp_path / "run", checkpoint_every=1, ema_decay=0.0)
    saved = [checkpoint.load(tmp_path / "run" / "checkpoints" / f"step_{number:08d}") for number in (1, 2, 3)]
    before, after, later = (
        {name: value for name, value in found.model.items() if not name.endswith("num_batches_tracked")}
        for found in saved
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    rows = [row for row in read_rows(tmp_path / "run" / METRICS) if "train/left_out" in row]
    assert rows[-1]["train/left_out"] == 1
    assert len(list((tmp_path / "run" / "blackbox").glob("step_*/rank_0.json"))) == 1


def test_a_run_goes_on_on_the_cpu_and_back(exact_products: None, stripes_set: Path, tmp_path: Path) -> None:
    """A checkpoint does not know where it was made."""
    values = {"epochs": 3, "dropout": 0.0, "checkpoint_every": 1}
    whole = run(stripes_set, tmp_path / "whole", **values)
    for device, until in ((DEVICE, 3), ("cpu", 6), (DEVICE, 99)):
        begin_and_die(gpu_config(stripes_set, tmp_path / "run", **values, device=device), until)
    assert trace_of(tmp_path / "run").ledger == whole.ledger
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=0.05)


def test_what_a_gpu_trained_predicts_on_a_cpu(exact_products: None, stripes_set: Path, tmp_path: Path) -> None:
    run(stripes_set, tmp_path / "run")
    on_cpu, on_gpu = (load_model(tmp_path / "run", device=name) for name in ("cpu", DEVICE))
    assert all(tensor.device.type == "cpu" for tensor in on_cpu.model.state_dict().values())
    x_NCHW = torch.rand(3, 3, 8, 8)
    with torch.inference_mode():
        found = on_gpu.model(x_NCHW.to(DEVICE)).cpu()
        torch.testing.assert_close(found, on_cpu.model(x_NCHW), rtol=1e-4, atol=1e-4)


def test_compiled(stripes_set: Path, tmp_path: Path) -> None:
    values = {"epochs": 1, "dropout": 0.0, "checkpoint_every": 1}
    first = run(stripes_set, tmp_path / "a", compile=True, **values)
    assert run(stripes_set, tmp_path / "b", compile=True, **values) == first, "the same bits twice over"
    run(stripes_set, tmp_path / "eager", **values)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "eager"), rel=1e-2)


def test_doctor_sees_the_gpu(tmp_path: Path) -> None:
    done = command(python("-m", "distcnn", "doctor", "--output", tmp_path), tmp_path)
    lines = done.out.splitlines()
    assert any(line.startswith("ok    GPU ") and "CUDA" in line for line in lines), done.out + done.err
    assert any(line.split()[1:2] == ["bf16"] for line in lines)
