"""Training with W&B online: what arrives at a server is what metrics.jsonl says; a server in trouble costs nothing.

The service that wandb starts is the real one; the server is tests/wandb_server.py. Every kind of trouble has its test
in tests/faults/test_wandb_trouble.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from distcnn.config import load_toml
from distcnn.runfolder import METRICS, read_rows
from tests.support import command, python
from tests.wandb_server import KEY, serving

SMALL = "--epochs 2 --threads 1 --global-batch-size 32 --tile-size 4 --log-every 1 --device cpu --wandb-mode online"


def train(data: Path, run: Path, *more: str) -> list[str | Path]:
    return python("-m", "distcnn", "train", "--data", data, "--output", run, *SMALL.split(), *more)


def test_what_arrives_is_what_the_run_folder_says(stripes_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = train(stripes_set, run, "--wandb-project", "p", "--wandb-name", "n", "--wandb-tags", "a", "b c")
    with serving() as server:
        done = command(words, tmp_path, HOME=str(tmp_path / "home"), **server.environment)
        arrived = server.arrived
    assert done.code == 0 and "warning" not in done.err, done.err
    assert arrived.rows() == read_rows(run / METRICS) and len(arrived.rows()) == 8, "6 steps, 2 evaluations"
    assert arrived.complete
    results = json.loads((run / "results.json").read_text())
    plain = {name: value for name, value in results.items() if isinstance(value, str | int | float)}
    assert {name: arrived.summary[name] for name in plain} == plain
    assert (arrived.run["project"], arrived.run["displayName"], arrived.run["tags"]) == ("p", "n", ["a", "b c"])
    config = arrived.config
    assert config["global_batch_size"]["value"] == 32 and len(config["classes"]["value"]) == 5
    assert {"git", "fingerprint", "hardware", "versions"} <= set(config)
    axes = config["_wandb"]["value"]["m"]  # define_metric, in W&B's numbers: 1 name, 2 pattern, 5 index of its axis
    assert [(axis.get("1"), axis.get("2"), axis.get("5")) for axis in axes] == [
        ("samples_seen", None, None),
        (None, "*", 1),
    ]

    tables = {name.split("/")[-1].split("_")[0] for name in arrived.files if name.endswith(".table.json")}
    assert tables == {"classes", "confusion", "reliability", "samples"}
    (samples,) = (found for found in arrived.of_type("run_table") if "samples" in found.said["artifactCollectionName"])
    assert sum(name.endswith(".png") for name in samples.files) > 5, "the table has its pictures"
    (data,) = arrived.of_type("dataset")
    fingerprint = data.files["fingerprint.txt"].decode().strip()
    assert fingerprint == config["fingerprint"]["value"] and arrived.used == ["a5"], "the run takes it as its input"
    models = arrived.of_type("model")
    assert all(found.committed for found in arrived.artifacts.values())
    for alias in ("best", "latest"):
        weights = (run / "checkpoints" / alias / "model.safetensors").read_bytes()
        assert any(alias in found.aliases and found.files["model.safetensors"] == weights for found in models)
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holders == [], "the key stands in no file"


def test_a_run_that_goes_on_is_the_same_curve(stripes_set: Path, tmp_path: Path) -> None:
    """Stopped in the middle of the second epoch, then resumed: the rows of both stand behind each other, each once."""
    run = tmp_path / "run"
    environment = {"HOME": str(tmp_path / "home"), "WANDB_LOG_MODEL": "false"}
    stop = "import sys; from distcnn.preempt import StopRequest; from distcnn.cli import main\n"
    stop += "asked = iter([0.0] * 4); StopRequest.wanted = lambda self, seconds: next(asked, 1.0)\n"
    words = train(stripes_set, run)
    with serving() as server:
        first = command(
            python("-c", f"{stop}sys.exit(main(sys.argv[1:]))", *words[3:]),
            tmp_path,
            **environment,
            **server.environment,
        )
        assert first.code == 75, first.out + first.err
        before = server.arrived.rows()
        second = command(words, tmp_path, **environment, **server.environment)
        rows = server.arrived.rows()
    assert second.code == 0 and "warning" not in second.err, second.err
    assert 0 < len(before) < len(rows) and rows[: len(before)] == before
    assert rows == read_rows(run / METRICS) and [row["step"] for row in rows if "train/loss" in row] == [*range(1, 7)]
    assert server.arrived.asked.count("RunResumeStatus") == 2
    assert not server.arrived.of_type("model"), "WANDB_LOG_MODEL=false"


@pytest.mark.slow
def test_an_agent_runs_the_trials_of_the_sweep_file(stripes_set: Path, tmp_path: Path) -> None:
    """`wandb agent` itself, on configs/sweep.yaml but for the number of epochs and the size of the images."""
    root = Path(__file__).parent.parent
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "flowers").symlink_to(stripes_set)
    (tmp_path / "train.py").symlink_to(root / "train.py")
    sweep = (root / "configs" / "sweep.yaml").read_text().replace("--image-size 64 --epochs 15", "--epochs 1")
    agent = Path(sys.executable).parent / "wandb"
    with serving() as server:
        server.arrived.sweep, server.arrived.trials = sweep, [{"lr": 0.002, "label_smoothing": 0.1}]
        words: list[str | Path] = [agent, "agent", "--count", "1", "someone/p/s"]
        path = f"{agent.parent}:{os.environ['PATH']}"
        done = command(words, tmp_path, HOME=str(tmp_path / "home"), PATH=path, **server.environment)
        arrived = server.arrived
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "sweep" / "trial1"
    assert arrived.rows() == read_rows(run / METRICS) and arrived.run["name"] == "trial1", done.out + done.err
    config = load_toml(run / "config.toml")
    assert (config.optim.lr, config.optim.label_smoothing) == (0.002, 0.1)
