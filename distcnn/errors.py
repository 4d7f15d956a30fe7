"""What a user can mend: one line that says what, where and what to do. The command line prints it and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: stopped on request with everything saved; run the same command again


class UserError(Exception):
    """Bad input, found before anything was changed. Its text is the whole message: one line, no trace back.

    `speaks`: this process prints it even if it is not rank 0.
    """

    exit_code = EXIT_USAGE

    def __init__(self, text: str, speaks: bool = False) -> None:
        super().__init__(text)
        self.speaks = speaks


class DataError(UserError):
    """Bad data: names the file or shard, and the key where there is one."""


class LostRank(UserError):
    """Another process of the run has died, failed or hangs: nothing that this one did wrong. Run it again."""

    exit_code = EXIT_FAILED


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' for the valid name closest to `name`, or the list of valid ones if none is close."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"
