"""Synchronised batch norm on two processes is plain batch norm on the whole batch, forwards and backwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from torch import nn
from distcnn.batchnorm import TileStatistics, convert
from distcnn.config import RunConfig
from distcnn.distributed import Runtime
from distcnn.world import read_world

runtime = Runtime(RunConfig(device="cpu"), read_world(), threads=1)
torch.manual_seed(0)
whole = torch.randn(6, 3, 4, 4, dtype=torch.float64)
slopes = torch.randn(6, 3, 4, 4, dtype=torch.float64)
plain = nn.BatchNorm2d(3).double()
nn.init.normal_(plain.weight)
synced = nn.BatchNorm2d(3).double()
synced.load_state_dict(plain.state_dict())
convert(synced, "sync", runtime.sum_with_gradient)
synced.double()

rank = runtime.world.rank
mine = slice(0, 2) if rank == 0 else slice(2, 6)  # uneven on purpose
x = whole[mine].clone().requires_grad_()
y = synced(x)
(y * slopes[mine]).sum().backward()

reference = whole.clone().requires_grad_()
expected = plain(reference)
(expected * slopes).sum().backward()

torch.testing.assert_close(y, expected[mine], rtol=1e-12, atol=1e-12)
torch.testing.assert_close(x.grad, reference.grad[mine], rtol=1e-11, atol=1e-11)
weight = runtime.sum_with_gradient(synced.weight.grad)
torch.testing.assert_close(weight, plain.weight.grad, rtol=1e-11, atol=1e-11)
statistics = TileStatistics(synced)
runtime.add(statistics.collect(len(x)))
statistics.apply(runtime.totals(), 6, torch.tensor(True))
torch.testing.assert_close(synced.running_mean, plain.running_mean, rtol=1e-6, atol=1e-7)
torch.testing.assert_close(synced.running_var, plain.running_var, rtol=1e-6, atol=1e-7)

# A blank tile on rank 1 stands in for none: rank 0 is normalised by its own statistics alone.
statistics.begin(0 if rank else 2)
y = synced(x.detach())
if rank == 0:
    alone = nn.functional.batch_norm(x.detach(), None, None, plain.weight, plain.bias, True)
    torch.testing.assert_close(y, alone, rtol=1e-9, atol=1e-9)
runtime.close()
print("agreed", flush=True)
"""


def test_two_processes_equal_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "sync.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("agreed") == 2
