"""Every recipe in configs/ is valid and says where it comes from, what it costs and what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from distcnn.config import TrainConfig, load_toml
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
