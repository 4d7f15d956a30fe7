"""Being asked to stop: by a signal, a stop file, or the clock. All ranks stop after the same step, saved, exit code 75.

Who asks: SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or a first SIGINT to any rank; a file called `stop` in the run folder (what
a batch script's trap writes, since torchrun passes on SIGTERM alone); `--time-limit`; the death of the launcher. The
wish of one rank travels with a sum that every step makes anyway, so that all agree.

Signals are noted by a thread, which the C library's handler wakes through a pipe: a handler in Python would run only
when the main thread is back in Python, which it is not while it waits for a rank that hangs. Whatever else happens, a
process ends GRACE_SECONDS after a SIGTERM: schedulers send SIGKILL soon after, and an end of one's own is cleaner. One
that has not begun to train yet has nothing to save and ends sooner.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from distcnn.errors import EXIT_PREEMPTED

STOP_FILE = "stop"
LOOK_SECONDS = 1.0
GRACE_SECONDS = 28.0  # torchrun kills its workers 30 s after a SIGTERM
START_SECONDS = 3.0  # the same before training begins, when there is nothing to save
AGAIN_SECONDS = 2.0  # a SIGINT so soon after another is the same one: the terminal sends it, and torchrun passes it on
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(Exception):
    """Training has stopped on request; everything is saved (or, where `saved` is false, the last checkpoint stands)."""

    def __init__(self, reason: str, saved: bool) -> None:
        super().__init__(reason)
        self.reason, self.saved = reason, saved


class StopRequest:
    """Notes that this process is asked to stop. A context manager: the handlers are those of before afterwards.

    `saving` is set while the last checkpoint is written: from then on a second SIGINT is ignored, too.
    """

    def __init__(self, run: Path, looks_for_file: bool, time_limit_seconds: float = 0.0) -> None:
        self.reason = ""
        self.saving = False
        self._file = run / STOP_FILE
        self._looks = looks_for_file
        self._limit = time_limit_seconds
        self._started = time.monotonic()
        self._asked_at: dict[signal.Signals, float] = {}
        self._begun = False
        self._timer: threading.Timer | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._closed = threading.Event()

    def __enter__(self) -> StopRequest:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, lambda number, frame: None)
        self._listener = threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True)
        self._listener.start()
        if self._looks:
            threading.Thread(target=self._look, name="stop-file", daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)
        self._listener.join()

    def begin(self) -> None:
        """Training begins: from now on there is something to save."""
        self._begun = True
        asked_at = self._asked_at.get(signal.SIGTERM)
        if asked_at is not None:
            self._end_in(asked_at + GRACE_SECONDS - time.monotonic())

    def wanted(self, save_seconds: float = 0.0) -> bool:
        """Whether to stop now. `save_seconds`: what a save takes; it must fit in before the time limit."""
        if not self.reason and self._limit and self._elapsed() + 2 * save_seconds + 1 > self._limit:
            self.reason = f"--time-limit: {self._elapsed():.0f} s of {self._limit:.0f} s have passed"
        return bool(self.reason)

    def can_save(self, save_seconds: float) -> bool:
        """Whether a save that takes so long would end before the process must."""
        asked_at = self._asked_at.get(signal.SIGTERM)
        if asked_at is not None:
            return time.monotonic() - asked_at + save_seconds < GRACE_SECONDS
        return not self._limit or self._elapsed() + save_seconds < self._limit

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _listen(self, read_end: int) -> None:
        """Note the signals whose numbers come through the pipe, until it is closed."""
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in self._before:
                        self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number not in self._asked_at:
            self._asked_at[number] = now
            self.reason = self.reason or number.name
            if number == signal.SIGTERM:
                self._end_in(GRACE_SECONDS if self._begun else START_SECONDS)
        elif number == signal.SIGINT and now - self._asked_at[number] > AGAIN_SECONDS and not self.saving:
            os._exit(128 + signal.SIGINT)

    def _end_in(self, seconds: float) -> None:
        """The deadline, in place of an earlier one."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, lambda: os._exit(EXIT_PREEMPTED))
        self._timer.daemon = True
        self._timer.start()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError):
                if self._file.exists():
                    self.reason = self.reason or f"the file {self._file}"
                    return


def clear_stop_file(run: Path, restarts: int) -> bool:
    """Remove a stop file of an earlier run; rank 0 calls it at the start. True if it asks this run to stop at once.

    A process that torchrun has restarted (`restarts` > 0) obeys it: it was written for the job that goes on.
    """
    file = run / STOP_FILE
    if restarts and file.exists():
        return True
    file.unlink(missing_ok=True)
    return False
