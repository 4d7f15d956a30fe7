"""Several processes with a GPU each, by NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distcnn.config import to_toml
from tests.gpu.support import DEVICE, begin_and_die, gpu_config, losses, run
from tests.harness import trace_of
from tests.support import ROOT, command, python, torchrun

PROCESSES = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(PROCESSES < 2, reason=f"{PROCESSES} GPU here: NCCL needs 2")
FLAGS = "--epochs 2 --wandb-mode disabled --quiet --log-every 1 --checkpoint-every 10 --keep-checkpoints 99 --device"
SIZES = [size for size in (2, 4, 8) if size <= PROCESSES]


def train(processes: int, data: Path, output: Path, *more: str) -> Path:
    flags = [*FLAGS.split(), DEVICE, "--data", data, "--output", output, *more]
    words = torchrun(processes, ROOT / "train.py", *flags) if processes > 1 else python(ROOT / "train.py", *flags)
    done = command(words, output.parent, seconds=300)
    assert done.code == 0, done.err[-4000:]
    return output


@pytest.mark.parametrize("more", [(), ("--mixed-precision", "bf16", "--ema-decay", "0.99")], ids=["float32", "bf16"])
@pytest.mark.parametrize("processes", SIZES)
def test_the_tree_gives_the_same_bits_from_any_number_of_gpus(
    processes: int, more: tuple[str, ...], digits_set: Path, tmp_path: Path
) -> None:
    """Tiles, gradients, statistics of batch norm, loss: the sums run on a side stream beside the backward pass."""
    one, many = (train(size, digits_set, tmp_path / f"{size}", *more) for size in (1, processes))
    assert trace_of(many).ledger == trace_of(one).ledger and losses(many) == losses(one)
    assert trace_of(many).weights == trace_of(one).weights


def test_ddp_gives_the_same_up_to_rounding(digits_set: Path, tmp_path: Path) -> None:
    one, two = (train(size, digits_set, tmp_path / f"{size}", "--reduction", "ddp") for size in (1, 2))
    assert losses(two)[0] == pytest.approx(losses(one)[0], rel=1e-4)
    assert losses(two)[-1] == pytest.approx(losses(one)[-1], rel=0.2)


def test_two_gpus_go_on_where_one_stopped(stripes_set: Path, tmp_path: Path) -> None:
    whole = run(stripes_set, tmp_path / "whole", checkpoint_every=1)
    config = gpu_config(stripes_set, tmp_path / "run", checkpoint_every=1)
    begin_and_die(config, 4)
    (tmp_path / "config.toml").write_text(to_toml(config))
    done = command(torchrun(2, ROOT / "train.py", "--config", tmp_path / "config.toml"), tmp_path, seconds=300)
    assert done.code == 0, done.err[-4000:]
    assert trace_of(tmp_path / "run") == whole
