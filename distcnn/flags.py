"""Flags to dataclasses with tyro, and its errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import tyro

from distcnn.errors import UserError

FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagConversionOff)
_BOX = re.compile(r"[─━│┃╭╮╰╯┌┐└┘├┤┬┴┼]+")


def parse(options: Any, argv: Sequence[str], prog: str, description: str | None, default: Any = None) -> Any:
    """An `options` object of the flags `argv`. Raises UserError with one line for a flag or value that is wrong.

    Flags are flat whatever the nesting of the dataclass; a switch such as `--verify` needs no True behind it.
    `--help` prints and leaves through SystemExit(0).
    """
    errors = io.StringIO()
    given = {} if default is None else {"default": default}
    words = _spell_out(argv, _switches(options))
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(options, args=words, prog=prog, description=description, config=FLAT, **given)
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None


def _switches(options: Any) -> set[str]:
    """The flags of all bool fields of a dataclass, of its nested ones, and of those of a union."""
    if not dataclasses.is_dataclass(options):
        return set().union(*map(_switches, get_args(options)))
    types = get_type_hints(options)
    names = {f"--{name.replace('_', '-')}" for name, kind in types.items() if kind is bool}
    return names.union(*(_switches(kind) for kind in types.values() if dataclasses.is_dataclass(kind)))


def _spell_out(argv: Sequence[str], switches: set[str]) -> list[str]:
    """`argv` with True behind each switch that has no value."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        words.append(word)
        if word.replace("_", "-") in switches and following not in ("True", "False"):
            words.append("True")
    return words


def _one_line(text: str) -> str:
    """tyro's box of several lines as one."""
    return re.sub(r"\s+", " ", _BOX.sub(" ", text)).strip()
