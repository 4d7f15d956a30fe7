"""The outcome of a check, and how its figures are written. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

TITLES = {
    "runs": "short runs of the trainer",
    "order": "sample order and ledger",
    "pixels": "augmented pixels",
    "gradients": "gradients of 1 and more processes",
    "batchnorm": "batch norm's running statistics",
    "accumulation": "ragged last step",
    "schedule": "learning rate",
    "resume": "kill -9 and resume",
    "evaluation": "evaluation",
    "precision": "mixed precision",
    "overfit": "overfitting one batch",
    "finite": "nothing non-finite",
}


@dataclass
class Result:
    """A check's verdict. `measured` and `demanded` are a few words each; `problems` says what is wrong, and why."""

    name: str
    measured: str = ""
    demanded: str = ""
    problems: list[str] = field(default_factory=list)
    skipped: str = ""  # why it could not be made
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Literal["pass", "fail", "skip"]:
        return "fail" if self.problems else "skip" if self.skipped else "pass"

    @property
    def title(self) -> str:
        return TITLES[self.name]


def few(things: list[Any], most: int = 4) -> str:
    """A list in words: "3, 5, 8 and 12 more"."""
    shown = ", ".join(str(thing) for thing in things[:most])
    return shown if len(things) <= most else f"{shown} and {len(things) - most:,} more"


def plural(number: int, noun: str) -> str:
    """1 step, 2 steps, 1 process, 2 processes."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def among(numbers: Sequence[int]) -> str:
    """1, 2 and 4."""
    return " and ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))


def difference(value: float) -> str:
    """A relative difference: 'equal to the bit', or 3.1e-08."""
    return "equal to the bit" if value == 0 else f"{value:.1e}"
