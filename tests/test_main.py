"""The main command as a person starts it, in every way there is: one run, six doors."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distcnn import checkpoint
from distcnn.cli import main
from distcnn.config import TrainConfig, load_toml
from distcnn.data.keyed import full_digest
from distcnn.models import build_model
from distcnn.runfolder import read_rows
from tests import wandb_file
from tests.harness import trace_of
from tests.support import ROOT, Outcome, command, python

TRAIN = str(ROOT / "train.py")
BIN = Path(sys.executable).parent
FLAGS = ["--epochs", "2", "--device", "cpu"]
RUN = Path("runs") / "digits-cnn-seed0"
SAMPLES, VAL = 1438, 359

DOORS: dict[str, list[Any]] = {
    "python train.py": python(TRAIN),
    "accelerate launch": [BIN / "accelerate", "launch", "--cpu", TRAIN],
    "torchrun of 2": [BIN / "torchrun", "--standalone", "--nproc-per-node=2", TRAIN],
    "accelerate launch of 2": [BIN / "accelerate", "launch", "--num_processes", "2", "--cpu", TRAIN],
    "python -m distcnn": python("-m", "distcnn", "train"),
    "distcnn": [BIN / "distcnn", "train"],
}
MORE = {"python train.py": [], "distcnn": ["--wandb-mode", "disabled", "--quiet"]}  # the first as it comes, W&B and all


@dataclass(frozen=True)
class Started:
    """What a door led to: each in a folder of its own, where there is nothing yet."""

    outcome: Outcome
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / RUN


def start(door: str, folder: Path) -> Outcome:
    words = [*DOORS[door], *FLAGS, *MORE.get(door, ["--wandb-mode", "disabled"])]
    return command(words, folder, HOME=str(folder), HF_HOME=str(folder / "hf"))


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Started]:
    """All of them, two at a time."""
    folders = {door: tmp_path_factory.mktemp(door.replace(" ", "_")) for door in DOORS}
    with ThreadPoolExecutor(2) as pool:
        outcomes = {door: pool.submit(start, door, folder) for door, folder in folders.items()}
    return {door: Started(outcomes[door].result(), folders[door]) for door in DOORS}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_leads_to_the_same_run(doors: dict[str, Started], door: str) -> None:
    """Metrics, samples, weights and optimizer, to the last bit."""
    this, first = doors[door], doors["python train.py"]
    assert this.outcome.code == 0, this.outcome.err
    found, expected = trace_of(this.run), trace_of(first.run)
    assert found.metrics == expected.metrics and found.ledger == expected.ledger and found.weights == expected.weights
    results = [json.loads((run / "results.json").read_text()) for run in (this.run, first.run)]
    for name in ("val/top1", "val/top5", "val/loss", "confusion", "per_class", "steps", "best/epoch"):
        assert results[0][name] == results[1][name], name
    assert results[0]["world_size"] == (2 if "of 2" in door else 1)


@pytest.mark.parametrize("door", DOORS)
def test_what_is_printed_is_plain_and_said_once(doors: dict[str, Started], door: str) -> None:
    out = doors[door].outcome.out
    assert "\x1b" not in out and "\r" not in out, "a pipe is no terminal"
    if "--quiet" in MORE.get(door, []):
        assert out == ""
        return
    lines = out.splitlines()
    assert lines[0].startswith("cnn (53,674 parameters) on data/digits: 1,438 images of 10 classes at 8 px; ")
    assert [line[:9] for line in lines if "val top-1" in line] == ["epoch 1/2", "epoch 2/2"]
    assert out.count("finished: runs/digits-cnn-seed0") == 1 and "top-1" in out and "try next" in out
    assert f"of {VAL} images" in out


@pytest.mark.parametrize("door", ["python train.py", "python -m distcnn", "distcnn"])
def test_nothing_is_said_on_stderr(doors: dict[str, Started], door: str) -> None:
    assert doors[door].outcome.err == ""


def test_the_files_of_a_run(doors: dict[str, Started]) -> None:
    run = doors["python train.py"].run
    wanted = {"config.toml", "log.txt", "logs", "metrics.jsonl", "results.json", "ledger.jsonl", "checkpoints"}
    assert wanted <= {path.name for path in run.iterdir()}
    assert not list(run.rglob(".*tmp*")) and not (run / "quarantine.jsonl").exists()
    steps = [path.name for path in sorted((run / "checkpoints").glob("step_*"))]
    assert steps == ["step_00000023", "step_00000046"]
    assert (run / "checkpoints" / "latest").resolve().name == steps[1]
    assert (run / "checkpoints" / "best").resolve().name in steps
    log = (run / "log.txt").read_text()
    assert "epoch 2/2  val top-1" in log and "finished" not in log.splitlines()[0]


def test_the_config_saved_repeats_the_run(doors: dict[str, Started]) -> None:
    config = load_toml(doors["python train.py"].run / "config.toml")
    assert config.optim.epochs == 2 and config.run.device == "cpu" and config.data == TrainConfig().data


def test_results_json(doors: dict[str, Started]) -> None:
    results = json.loads((doors["python train.py"].run / "results.json").read_text())
    fields = {"status", "val/top1", "val/top5", "val/loss", "val/top1_low", "val/top1_high", "val/calibration_error"}
    fields |= {"best/top1", "best/epoch", "train_samples", "val_samples", "epochs", "steps", "wall_seconds"}
    fields |= {"images_per_second", "world_size", "device", "seed", "per_class", "confusion", "versions"}
    assert fields <= set(results)
    assert results["status"] == "complete" and results["train_samples"] == SAMPLES and results["val_samples"] == VAL
    assert results["steps"] == 46 and results["epochs"] == 2 and results["seed"] == 0
    assert results["best/epoch"] == 1 and results["best/top1"] == results["val/top1"]
    assert 0.9 < results["val/top1"] <= results["val/top5"] <= 1
    assert results["val/top1_low"] < results["val/top1"] < results["val/top1_high"]
    confusion = torch.tensor(results["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == VAL
    assert confusion.diag().sum() == round(results["val/top1"] * VAL)
    assert sum(row["samples"] for row in results["per_class"]) == VAL
    assert 0 < results["wall_seconds"] < 100 and results["images_per_second"] > 0
    assert {"distcnn", "python", "torch", "torchvision", "numpy"} <= set(results["versions"])


def test_the_ledger_is_exact(doors: dict[str, Started]) -> None:
    digest = f"{full_digest(SAMPLES):016x}"
    expected = {"samples": SAMPLES, "digest": digest, "expected_samples": SAMPLES, "expected_digest": digest}
    assert read_rows(doors["torchrun of 2"].run / "ledger.jsonl") == [
        {"epoch": epoch, **expected, "exactly_once": True} for epoch in range(2)
    ]


def test_metrics_jsonl(doors: dict[str, Started]) -> None:
    rows = read_rows(doors["python train.py"].run / "metrics.jsonl")
    training = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if "val/top1" in row]
    assert [row["step"] for row in training] == [10, 20, 23, 30, 40, 46]
    assert [(row["step"], row["epoch"], row["samples_seen"]) for row in evaluations] == [
        (23, 1, SAMPLES),
        (46, 2, 2 * SAMPLES),
    ]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    named = {"step", "epoch", "samples_seen", "train/loss", "train/lr", "train/grad_norm"}
    assert all(named | {"perf/images_per_second", "perf/wait_share"} <= set(row) for row in training)
    assert training[-1]["train/loss"] < training[0]["train/loss"] / 2, "it learns"
    # The learning rate of step 10, the tenth of the 23 of the warm-up, and of the very last one.
    assert training[0]["train/lr"] == pytest.approx(0.003 * 10 / 23) and 0 < training[-1]["train/lr"] < 0.003 / 23


def test_wandb_without_a_key_is_a_mirror_of_metrics_jsonl(doors: dict[str, Started]) -> None:
    run = doors["python train.py"].run
    (folder,) = (run / "wandb").glob("offline-run-*")
    records = wandb_file.records(folder)
    assert wandb_file.rows(records) == read_rows(run / "metrics.jsonl")
    summary = wandb_file.summary(records)
    assert summary["status"] == "complete" and summary["val/top1"] > 0.9
    ending = {"evaluation/classes", "evaluation/reliability_table", "evaluation/confusion_table", "evaluation/samples"}
    assert ending <= wandb_file.media(records)
    (data,) = wandb_file.artifacts(records, "dataset")
    models = wandb_file.artifacts(records, "model")
    assert {alias for model in models for alias in model.aliases} == {"best", "latest"}
    for model in models:
        assert json.loads(model.metadata)["fingerprint"] == json.loads(data.metadata)["fingerprint"]
        files = {entry.path: Path(entry.local_path) for entry in model.manifest.contents}
        assert "model.safetensors" in files and all(file.is_file() for file in files.values())
    assert not (doors["python train.py"].folder / ".local").exists(), "nothing stays in the home folder"
    (latest,) = {checkpoint.load(run / "checkpoints" / "latest").state["wandb_id"]}
    assert folder.name.endswith(latest)


def test_the_checkpoint_says_all_that_prediction_needs_and_loads_into_the_plain_model(
    doors: dict[str, Started],
) -> None:
    run = doors["python train.py"].run
    saved = checkpoint.load(run / "checkpoints" / "best")
    assert saved.state["classes"] == [str(digit) for digit in range(10)]
    assert saved.state["preprocessing"]["size"] == 8 and len(saved.state["preprocessing"]["mean"]) == 3
    assert saved.state["config"]["model"] == "cnn" and saved.state["position"]["samples"] % SAMPLES == 0
    model = build_model(load_toml(run / "config.toml").model, 10, 8, seed=1)
    model.load_state_dict(saved.model, strict=True)


def what_was_learnt(run: Path) -> list[Path]:
    """All files of a run but those that say what a process did: log.txt, logs/."""
    return [path for path in run.rglob("*") if path.is_file() and not path.relative_to(run).parts[0].startswith("log")]


def test_the_same_command_again_says_it_is_complete_and_changes_nothing(
    doors: dict[str, Started], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = doors["python -m distcnn"].run
    before = {path: path.read_bytes() for path in what_was_learnt(run)}
    monkeypatch.chdir(doors["python -m distcnn"].folder)
    assert main(["train", *FLAGS, "--wandb-mode", "disabled"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("complete already: runs/digits-cnn-seed0 (--resume never trains it anew")
    assert "val top-1" not in said.out and said.err == ""
    assert {path: path.read_bytes() for path in what_was_learnt(run)} == before


def test_another_run_in_the_same_folder_is_refused_in_one_line(
    doors: dict[str, Started], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(doors["distcnn"].folder)
    assert main(["train", *FLAGS, "--lr", "0.1"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "distcnn train: error: runs/digits-cnn-seed0 holds another run (lr was 0.003, now 0.1): give a new --output,"
        " or --resume never to begin anew\n",
    )
