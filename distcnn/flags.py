"""Flags to dataclasses with tyro, and its errors as one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro

from distcnn.errors import UserError

FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
_CORNERS = ("╭", "╰")
_HELP_INDENT = (" " * 9,)  # what a flag means stands below it, deeper than its name
_OMITTED = ("Argument helptext", "For full helptext")


def parse(options: Any, argv: Sequence[str], prog: str, description: str | None, default: Any = None) -> Any:
    """An `options` object of the flags `argv`. Raises UserError with one line for a flag or value that is wrong.

    Flags are flat whatever the nesting of the dataclass; a bool is a pair such as `--verify` and `--no-verify`.
    `--help` prints and leaves through SystemExit(0).
    """
    errors = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(options, args=list(argv), prog=prog, description=description, config=FLAT, **given)
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None


def _one_line(text: str) -> str:
    """The sentences of tyro's box, without its title and the help texts of flags."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        content = line.strip("│").rstrip()
        if not content.strip(" ─"):
            sections.append([])
        elif not content.startswith(_CORNERS + _HELP_INDENT):
            sections[-1].append(content.strip())
    spoken = [" ".join(section) for section in sections if section and not section[0].startswith(_OMITTED)]
    return "; ".join(spoken[:1] + [more[0].lower() + more[1:] for more in spoken[1:]]) or " ".join(text.split())
