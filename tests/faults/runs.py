"""The small run that all faults are tried on, and what it must have come to in the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distcnn.runfolder import read_rows

STEPS = 24  # 4 epochs of 6; 83 images, so each epoch's last step is ragged


def flags(data: Path, run: Path, *more: str | Path) -> list[str]:
    """Flags of the run. Every step is a row of metrics; nothing is printed but warnings and errors."""
    words = ["--data", data, "--output", run, "--device", "cpu", "--threads", "1", "--decode-threads", "1"]
    words += [
        "--epochs",
        "4",
        "--global-batch-size",
        "16",
        "--tile-size",
        "2",
        "--channels",
        "4",
        "8",
        "--hidden",
        "16",
    ]
    words += ["--dropout", "0.2", "--ema-decay", "0.9", "--log-every", "1", "--wandb-mode", "disabled", "--quiet"]
    return [str(word) for word in [*words, *more]]


def weights(run: Path) -> dict[str, bytes]:
    """The files of the last checkpoint that hold weights, byte for byte."""
    last = run / "checkpoints" / "latest"
    return {name: (last / name).read_bytes() for name in ("model.safetensors", "ema.safetensors")}


def state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint."""
    found: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return found


def results(run: Path) -> dict[str, Any]:
    """What results.json holds."""
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def assert_same(run: Path, reference: Path, bits: bool = True) -> None:
    """However often `run` was interrupted: it is complete, the same as `reference`, and tidy.

    The same weights (to the bit, if `bits`), the same loss at every step, every sample once, no row twice.
    """
    assert results(run)["status"] == "complete"
    if bits:
        assert weights(run) == weights(reference)
    ledger = read_rows(run / "ledger.jsonl")
    assert ledger == read_rows(reference / "ledger.jsonl") and all(row["exactly_once"] for row in ledger)
    rows, expected = read_rows(run / "metrics.jsonl"), read_rows(reference / "metrics.jsonl")
    assert [(row["step"], row["epoch"], "val/top1" in row) for row in rows] == [
        (row["step"], row["epoch"], "val/top1" in row) for row in expected
    ]
    for row, other in zip(rows, expected, strict=True):
        for name in ("train/loss", "train/lr", "val/loss", "val/top1", "samples_seen"):
            assert row.get(name) == other.get(name) or not bits, (name, row, other)
    assert_tidy(run)


def assert_tidy(run: Path) -> None:
    """Nothing is left of what was interrupted."""
    stray = [path for path in run.rglob("*") if path.name.startswith((".", "starts")) or path.suffix == ".tmp"]
    assert not stray, stray
    assert not (run / "stop").exists()


def processes_of(run: Path) -> list[int]:
    """Processes of this machine that have the run folder on their command line, without this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found
