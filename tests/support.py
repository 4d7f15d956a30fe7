"""What the tests of the trainer share: commands that end, and a small data set."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # of a command, before it is killed: no test hangs
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "SLURM_", "WANDB_")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines in which distcnn says what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("distcnn")]


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what launchers and W&B left in it, so that a command starts as from a shell."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    kept |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    return kept | more


def command(words: Sequence[str | Path], cwd: Path, seconds: float = SECONDS, **environment: str) -> Outcome:
    """Run a command in `cwd` to its end. After `seconds` it is killed with all that it started, and the test fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # a pipe would wait for orphans, too
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=cwd,
            env=clean_environment(**environment),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            for pid in [*descendants(process.pid), process.pid]:  # torchrun's workers are in sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if code is None:
        pytest.fail(f"{' '.join(map(str, words))} did not end within {seconds} s:\n{texts[0]}\n{texts[1]}")
    return Outcome(code, *texts)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` has started, and theirs."""
    parent = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for known in found:
        found += [child for child, of in parent.items() if of == known]
    return found[1:]


def skip_or_fail(why: str) -> NoReturn:
    """Leave a test out, saying why; where it must not be left out (.ci/run sets REQUIRE_CLUSTER=1), fail."""
    if os.environ.get("REQUIRE_CLUSTER") == "1":
        pytest.fail(why)
    pytest.skip(why)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Call work(0), work(1), ... at the same time."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def check_indices(script: str, cwd: Path) -> None:
    """Run Python whose kernels are compiled with checks of every index; it must print that they are made."""
    done = command([sys.executable, "-c", script], cwd, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(cwd))
    assert done.code == 0, done.err
    assert done.out.strip().endswith("checked")


def python(*words: str | Path) -> list[str | Path]:
    """A command of this Python."""
    return [sys.executable, *words]


def torchrun(processes: int, *words: str | Path) -> list[str | Path]:
    """torchrun on this machine, with a port that is free."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words)


def stripes(label: int, side: int, noise: np.random.Generator) -> np.ndarray:
    """(side, side, 3) uint8: stripes whose angle and colour are the class, so that a small CNN can learn them."""
    angle = label * np.pi / 5
    rows, columns = np.mgrid[:side, :side]
    wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 1.5 + noise.uniform(0, 6.3))
    colour = np.array([1.0, 0.4 + 0.1 * label, 1.0 - 0.15 * label])
    return (127 + 80 * wave[..., None] * colour + noise.normal(0, 25, (side, side, 3))).clip(0, 255).astype(np.uint8)


def make_stripes(root: Path, train: int, val: int, classes: int = 5, side: int = 8) -> Path:
    """A data set of `train` and `val` images of stripes in `root`."""
    from distcnn.data.prepare.arrays import source_of_arrays
    from distcnn.data.prepare.build import Settings, build

    noise = np.random.default_rng(7)
    parts = []
    for split, samples in (("train", train), ("val", val)):
        labels = noise.integers(0, classes, samples)
        labels[:classes] = np.arange(classes)
        parts.append((split, np.stack([stripes(int(label), side, noise) for label in labels]), labels))
    build(source_of_arrays("arrays", "stripes", parts), root, Settings())
    return root
