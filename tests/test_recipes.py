"""Every recipe in configs/ is valid and says where it comes from, what it costs and what it gives."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from distcnn.config import TrainConfig, flatten, load_toml, parse_train
from tests.support import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.toml"))


def test_there_are_recipes() -> None:
    assert "digits.toml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_has_its_header(path: Path) -> None:
    load_toml(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Source:" in head and "Run:" in head and f"--config configs/{path.name}" in head


def test_the_digits_are_the_defaults() -> None:
    assert load_toml(ROOT / "configs" / "digits.toml") == TrainConfig()


def test_the_sweep_is_one_that_wandb_takes_and_its_trials_are_runs(tmp_path: Path) -> None:
    """The command that the agent would start, with the values at the ends of each parameter."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text(encoding="utf-8"))
    assert set(sweep["parameters"]) <= set(flatten(TrainConfig()))
    assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"} and (ROOT / sweep["program"]).is_file()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.defpath}", "WANDB_RUN_ID": "abc"}
    for end in (0, -1):
        values = {name: (p.get("values") or [p["min"], p["max"]])[end] for name, p in sweep["parameters"].items()}
        flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
        words = [w for word in create_sweep_command(sweep["command"]) for w in (flags if word == "${args}" else [word])]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        program, *given = done.stdout.splitlines()
        config = parse_train(given)
        assert program == "train.py" and config.output == Path("runs/sweep/abc")
        assert {name: flatten(config)[name] for name in values} == values
