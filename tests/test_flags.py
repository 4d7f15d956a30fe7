from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from distcnn.errors import UserError, nearest
from distcnn.flags import parse


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    """How deep."""


@dataclass(frozen=True)
class Options:
    path: Annotated[str, tyro.conf.Positional]
    """Where it is, told in so many words that a terminal of eighty columns has to break the line somewhere, twice."""
    output: str
    """Where it goes."""
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    verify: bool = False


def test_flags_are_flat_and_bools_are_pairs() -> None:
    found = parse(Options, ["x", "--output", "y", "--depth", "4", "--verify", "--kind=b"], "prog", None)
    assert found == Options("x", "y", Inner(4), "b", True)
    assert parse(Options, ["x", "--output", "y", "--no-verify"], "prog", None) == Options("x", "y")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x"], "Missing from prog: --output STR"),
        ([], "Missing from prog: STR --output STR"),
        (["x", "--output"], "Missing value for argument '--output'. Expected 1 values."),
        (["x", "--output", "y", "--depht", "3"], "Unrecognized options: --depht, 3; perhaps you meant: --depth INT"),
        (["x", "--output", "y", "--depth", "x"], "Error parsing --depth: invalid literal for int() with base 10: 'x'"),
        (
            ["x", "--output", "y", "--kind", "c"],
            "invalid choice 'c' for argument '--kind'. Expected one of ('a', 'b').",
        ),
    ],
)
def test_what_is_wrong_is_one_short_line(argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Options, argv, "prog", None)
    assert str(caught.value) == said


def test_help_prints_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Options, ["--help"], "prog", "What it is for.")
    shown = capsys.readouterr().out
    assert caught.value.code in (0, None) and "What it is for." in shown and "--depth INT" in shown


@pytest.mark.parametrize(
    ("name", "valid", "said"),
    [
        ("epoch", ["epochs", "lr"], "; did you mean 'epochs'?"),
        ("zzz", ["epochs", "lr"], "; valid: epochs, lr"),
        ("", ["a"], "; valid: a"),
    ],
)
def test_nearest(name: str, valid: list[str], said: str) -> None:
    assert nearest(name, iter(valid)) == said
