"""Every recipe in configs/ is valid, can be built, and says where it comes from, what it costs and what it gives."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from distcnn.config import TrainConfig, flatten, load_toml, parse_train
from distcnn.optim import build_optimizer, build_schedule
from distcnn.shapes import meta_model
from tests.support import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.toml"))
# Classes and sides of the images that a recipe is for, where it leaves the size to them.
SETS = {"digits": (10, 8), "cifar10": (10, 32), "fashion": (10, 28), "flowers": (5, 128), "imagenet": (1000, 224)}


def test_there_are_recipes() -> None:
    found = {path.stem for path in RECIPES}
    assert found >= {"digits", "fashion_mnist", "cifar10_simple", "cifar10_fast", "flowers", "finetune"}
    assert found >= {f"imagenet_resnet50_{name}" for name in ("16ep", "32ep", "88ep", "a3")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_has_its_header(path: Path) -> None:
    load_toml(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Source:" in head and "Run:" in head and f"--config configs/{path.name}" in head
    measured = ("mean" in head or "n = 1" in head) and "torch 2." in head
    assert measured or "Not run by us" in head, "a figure has its n, mean, spread and machine, or there is none"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_what_a_recipe_asks_for_can_be_built(path: Path) -> None:
    """Its network takes its images at every size, its optimizer the network, its schedule ends low."""
    config = load_toml(path)
    classes, side = SETS.get(path.stem.split("_")[0], (7, 224))
    size = config.data.image_size or side
    model = meta_model(config.model, classes, size)
    for own in (size, *config.data.progressive):
        assert model(torch.empty(2, 3, own, own, device="meta")).shape == (2, classes)
    optimizer = build_optimizer(config.optim, meta_model(config.model, classes, size).to_empty(device="cpu"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) > 0
    schedule = build_schedule(config.optim, 100)
    assert (
        schedule(100 * config.optim.epochs - 1)
        < 0.05 * config.optim.lr
        == 0.05 * max(schedule(step) for step in range(100 * config.optim.epochs))
    )


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
