"""One training run under torchrun, killed again and again at random moments; in the end it is the uninterrupted run.

    python tests/faults/chaos.py --kills 100

Killed are one rank, all ranks, the launcher, or rank 0 while it saves, always with SIGKILL; one kill in five comes
while the processes start. torchrun restarts the ranks (--max-restarts); when it gives up or is gone, the same command
is given again, as a scheduler would. Afterwards: the weights are those of the uninterrupted run to the bit, the ledger
says that every sample came once in each epoch, no row of metrics is there twice, no process and no file is left over.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distcnn.checkpoint import step_of
from distcnn.runfolder import METRICS, read_rows
from distcnn.starts import STARTS
from tests.faults.runs import assert_same, processes_of
from tests.support import ROOT, clean_environment, python, torchrun

KINDS = ("rank", "ranks", "launcher", "save")
SECONDS = 300.0  # that any single thing may take
ORPHAN_SECONDS = 60.0  # that ranks may live without their launcher: they save themselves first


@dataclass
class Report:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    restarts: int = 0  # of the ranks by torchrun
    guarded: int = 0  # times that the run gave up for lack of progress, which is right if kills come fast
    lost: list[int] = field(default_factory=list)  # steps that each kill cost
    seconds: float = 0.0

    def __str__(self) -> str:
        lost = sorted(self.lost)
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kinds}), {self.launches} launches, {self.restarts} restarts by torchrun,"
            f" {self.guarded} halts for lack of progress; steps lost: median {lost[len(lost) // 2]}, most {lost[-1]},"
            f" in all {sum(lost)}; {self.seconds:.0f} s"
        )


class Chaos:
    """The run, its launcher and the killer."""

    def __init__(self, folder: Path, flags: list[str], kinds: list[str], seed: int) -> None:
        self.folder, self.run, self.kinds = folder, folder / "run", kinds
        self.flags = [*flags, "--output", str(self.run)]
        self.report = Report()
        self._random = random.Random(seed)
        self._launcher: subprocess.Popen[bytes] | None = None

    def go(self, steps: int) -> Report:
        """Kill len(kinds) times within a run of `steps` steps, then let it end."""
        started = time.monotonic()
        try:
            for number, kind in enumerate(self.kinds):
                # In order of the steps, so that the kills are spread over the run, and the run gets on.
                target = round((number + self._random.random()) * steps / len(self.kinds))
                self._kill(kind, target)
            while self._ensure_launched().wait(SECONDS):
                self._relaunch_if_ended()
        finally:
            for pid in processes_of(self.run):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _kill(self, kind: str, target: int) -> None:
        early = self._random.random() < 0.2 and kind != "save"
        delay = self._random.uniform(0, 6)
        since = time.monotonic()
        while True:
            launcher = self._ensure_launched()
            ranks = self._ranks(launcher)
            if early:
                ready = time.monotonic() - since > delay
            elif kind == "save":
                ready = self._reached() >= target and bool(list(self.run.glob("checkpoints/.tmp-step_*")))
            else:
                ready = self._reached() >= target
            if ready and ranks:
                break
            assert time.monotonic() - since < SECONDS, f"no chance to kill {kind} at step {target}"
            time.sleep(0.002)
        victims = {
            "rank": [self._random.choice(ranks)],
            "ranks": ranks,
            "launcher": [launcher.pid],
            "save": [min(ranks, key=_rank_of)],
        }[kind]
        self.report.lost.append(max(self._reached() - self._saved(), 0))
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.report.kills[kind] += 1
        if kind == "launcher":
            launcher.wait()
            self._wait_for_orphans()
        else:
            self._wait_until(lambda: launcher.poll() is not None or not set(victims) & set(self._ranks(launcher)))
            self.report.restarts += launcher.poll() is None

    def _ensure_launched(self) -> subprocess.Popen[bytes]:
        self._relaunch_if_ended()
        assert self._launcher is not None
        return self._launcher

    def _relaunch_if_ended(self) -> None:
        if self._launcher is not None:
            if self._launcher.poll() is None or self._launcher.returncode == 0:
                return
            self._wait_for_orphans()
        if (self.run / STARTS).exists() and "has been started" in self._log()[-2000:]:
            self.report.guarded += 1
            (self.run / STARTS).unlink()
        with (self.folder / "launcher.txt").open("ab") as log:
            command = [*torchrun(2, "--max-restarts=3", ROOT / "train.py"), *self.flags]
            self._launcher = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env=clean_environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.report.launches += 1

    def _log(self) -> str:
        return (self.folder / "launcher.txt").read_text(errors="replace")

    def _ranks(self, launcher: subprocess.Popen[bytes]) -> list[int]:
        """The launcher's living children that train."""
        return [pid for pid in processes_of(self.run) if _parent_of(pid) == launcher.pid]

    def _wait_for_orphans(self) -> None:
        """Ranks without a launcher end by themselves."""
        self._wait_until(lambda: not processes_of(self.run), ORPHAN_SECONDS, "ranks outlive their launcher")

    def _wait_until(self, what: object, seconds: float = SECONDS, complaint: str = "did not happen") -> None:
        until = time.monotonic() + seconds
        while not what():  # type: ignore[operator]
            assert time.monotonic() < until, f"{complaint} ({seconds:g} s)\n{self._log()[-4000:]}"
            time.sleep(0.01)

    def _reached(self) -> int:
        rows = read_rows(self.run / METRICS)
        return int(rows[-1]["step"]) if rows else 0

    def _saved(self) -> int:
        folder = self.run / "checkpoints"
        return max([0, *(step_of(path) for path in (folder.iterdir() if folder.exists() else ()))])


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


def _rank_of(pid: int) -> int:
    try:
        names = dict(part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part)
        return int(names["RANK"])
    except (OSError, KeyError, ValueError):
        return 1 << 30


def chaos(folder: Path, data: Path, kinds: list[str], epochs: int, seed: int) -> Report:
    """Run and check; raises AssertionError for whatever is not as it should be."""
    flags = ["--data", data, "--device", "cpu", "--threads", "1", "--decode-threads", "1", "--epochs", epochs]
    flags += ["--quiet", "--ema-decay", "0.9", "--dropout", "0.1", "--checkpoint-every", "5", "--log-every", "1"]
    words = [str(word) for word in [*flags, "--wandb-mode", "disabled"]]
    before = set(Path("/dev/shm").iterdir())
    reference = folder / "reference"
    subprocess.run(
        list(map(str, python(ROOT / "train.py", *words, "--output", reference))), env=clean_environment(), check=True
    )
    steps = read_rows(reference / METRICS)[-1]["step"]
    work = Chaos(folder, words, kinds, seed)
    report = work.go(steps)
    assert_same(work.run, reference)
    assert not processes_of(work.run)
    left = [path for path in set(Path("/dev/shm").iterdir()) - before if path.stat().st_uid == os.getuid()]
    assert not left or len(left) < 2 + report.launches, left
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=0, help="default: enough for 8 steps between kills")
    parser.add_argument("--folder", type=Path, help="an empty one, kept (default: a temporary one)")
    options = parser.parse_args()
    epochs = options.epochs or max(options.kills * 8 // 23, 2)
    pick = random.Random(options.seed)
    kinds = [pick.choice(KINDS) for _ in range(options.kills)]
    with tempfile.TemporaryDirectory() as name:
        from distcnn.data.prepare import prepare_digits

        folder = options.folder or Path(name)
        prepare_digits(folder / "digits")
        print(chaos(folder, folder / "digits", kinds, epochs, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
