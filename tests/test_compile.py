"""torch.compile with batch norm by tile: the same run from any number of processes, near the one without it."""

from __future__ import annotations

import json
from pathlib import Path

from distcnn.runfolder import read_rows
from tests.support import ROOT, command, python, torchrun

FLAGS = (
    "--epochs",
    "1",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--wandb-mode",
    "disabled",
    "--quiet",
    "--log-every",
    "1",
)


def test_a_compiled_run_is_the_same_from_two_processes(digits_set: Path, tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # compiled once, in a minute
    flags = (*FLAGS, "--data", str(digits_set))
    runs = {
        "eager": python("-m", "distcnn", "train", *flags),
        "one": python("-m", "distcnn", "train", *flags, "--compile"),
        "two": torchrun(2, ROOT / "train.py", *flags, "--compile"),
    }
    for name, words in runs.items():
        done = command([*words, "--output", name], tmp_path, seconds=400, **cache)
        assert done.code == 0, done.err
    assert any((tmp_path / "cache").rglob("*.so")), "something was compiled"
    files = [tmp_path / name / "checkpoints" / "latest" / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = {
        name: [row["train/loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in runs
    }
    assert losses["one"] == losses["two"] and len(losses["one"]) == 23
    assert losses["one"] != losses["eager"] and abs(losses["one"][0] - losses["eager"][0]) < 1e-5
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in runs]
    assert [result["world_size"] for result in results] == [1, 1, 2]
    assert max(result["val/loss"] for result in results) - min(result["val/loss"] for result in results) < 0.01
