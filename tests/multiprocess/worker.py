"""What torchrun starts for these tests: checks of the collectives, then the runs of some config files, one by one.

One launch for several runs, since starting the processes takes longer than what they do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from distcnn import distributed
from distcnn.config import RunConfig, load_toml
from distcnn.distributed import Runtime
from distcnn.errors import UserError
from distcnn.train import train
from distcnn.tree import tree_sum
from distcnn.world import read_world


def check_stages(runtime: Runtime) -> None:
    """As if the processes were on two nodes of this machine."""
    before = runtime._pairs, runtime._stages
    runtime._pairs, runtime._stages = [], distributed._stage_groups(runtime.world, 2)
    assert len(runtime._stages) == 2
    check_sums(runtime)
    runtime._pairs, runtime._stages = before


def check_sums(runtime: Runtime) -> None:
    """Against what every rank can work out for itself."""
    rank, size = runtime.world.rank, runtime.world.size
    for length in (0, 1, 2, size - 1, size, size + 1, 1000, 4097):
        pieces = [torch.randn(length, generator=torch.Generator().manual_seed(r)) * 10.0**r for r in range(size)]
        mine = pieces[rank].clone()
        runtime._tree_all_reduce(mine)
        assert torch.equal(mine, tree_sum(pieces)), f"tree over {length}"
    for step in range(3):  # the tiles of each rank, then the ranks
        leaves = torch.arange(2.0 * size, dtype=torch.float64).reshape(2 * size, 1) + step
        for leaf in leaves[2 * rank : 2 * rank + 2]:
            runtime.add(leaf.clone())
        assert runtime.totals().item() == leaves.sum().item()
    big = np.array([2**63 - 1, rank, -rank], dtype=np.int64)
    with np.errstate(over="ignore"):
        expected = np.stack([[2**63 - 1, r, -r] for r in range(size)]).astype(np.uint64).sum(0, dtype=np.uint64)
    assert (runtime.sum_integers(big).view(np.uint64) == expected).all(), "modulo 2^64"


def check_gathering(runtime: Runtime) -> None:
    """Rows of uneven number, none from rank 0; and rank 0's values everywhere."""
    rank, size = runtime.world.rank, runtime.world.size
    rows = np.full((2 * rank, 3), rank + 0.5)
    gathered = runtime.gather_rows(rows)
    assert gathered.tolist() == [[r + 0.5] * 3 for r in range(size) for _ in range(2 * r)]
    assert runtime.gather_rows(np.zeros((0, 6))).shape == (0, 6)
    for value in ({"a": [1, None, "ä"]}, "", [], 3.5, {"text": "x" * 100_000}):
        assert runtime.broadcast(value if rank == 0 else "of another rank") == value
    runtime.barrier()


def main() -> None:
    world = read_world()
    leave = Runtime.close
    Runtime.close = lambda runtime: None  # type: ignore[method-assign]  # torchrun's store takes one group
    runtime = Runtime(RunConfig(device="cpu"), world, threads=1)
    check_sums(runtime)
    if world.size == 4:
        check_stages(runtime)
    check_gathering(runtime)
    for path in map(Path, sys.argv[1:]):
        try:
            train(load_toml(path), world)
        except UserError as error:
            path.with_suffix(f".error{world.rank}").write_text(str(error))
    leave(runtime)
    sys.stderr.write(f"rank {world.rank} done\n")


if __name__ == "__main__":
    main()
