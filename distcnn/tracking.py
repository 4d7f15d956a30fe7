"""metrics.jsonl is the truth; Weights & Biases mirrors it, from a thread of its own that training never waits for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distcnn.config import RunConfig
from distcnn.runfolder import METRICS, RowFile, cut_rows
from distcnn.state import Position
from distcnn.world import wandb_key_present, wandb_url

FINISH_SECONDS = 60.0
INIT_SECONDS = 30.0
PROBE_SECONDS = 5.0


class Tracker:
    """Where rank 0 writes its rows. A resumed run continues the same files and the same W&B run."""

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        settings: Mapping[str, Any],
        position: Position,
        wandb_id: str,
        warn: Callable[[str], None],
    ) -> None:
        self._rows = RowFile(run / METRICS, warn)
        cut_rows(run / METRICS, lambda row: (row["epoch"], row["step"]) <= (position.epoch, position.total))
        self._wandb = None
        if config.wandb_mode != "disabled":
            self._wandb = WandbMirror(run, config, settings, wandb_id, warn)

    @property
    def wandb_id(self) -> str:
        return self._wandb.id if self._wandb else ""

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row; it has `step` and `samples_seen`."""
        self._rows.add(row)
        if self._wandb:
            self._wandb.put(dict(row))

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Hand the last rows to W&B and wait for it, but not for long."""
        if self._wandb:
            self._wandb.close(dict(summary or {}))


class WandbMirror:
    """Repeats rows to W&B. Whatever fails there becomes one warning, and training goes on."""

    def __init__(
        self, run: Path, config: RunConfig, settings: Mapping[str, Any], wandb_id: str, warn: Callable[[str], None]
    ) -> None:
        self.id = wandb_id or _new_id()
        self._run, self._config, self._settings, self._warn = run, config, dict(settings), warn
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._summary: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, row: dict[str, Any]) -> None:
        self._rows.put(row)

    def close(self, summary: dict[str, Any]) -> None:
        self._summary = summary
        self._rows.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._warn(
                f"W&B did not finish within {FINISH_SECONDS:.0f} s; 'wandb sync {self._run / 'wandb'}' uploads the rest"
            )

    def _work(self) -> None:
        try:
            tracked = self._begin()
            while (row := self._rows.get()) is not None:
                tracked.log(row)
            tracked.summary.update(self._summary)
            tracked.finish()
        except Exception as error:  # W&B is a mirror: nothing that happens there may end a training run
            self._warn(f"W&B stopped ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")

    def _begin(self) -> Any:
        """The W&B run; offline where online cannot be had, with a warning if there was reason to expect it."""
        import wandb

        trouble = ""
        if self._config.wandb_mode == "online" and wandb_key_present():
            trouble = unreachable(wandb_url())
            if not trouble:
                try:
                    return self._init(wandb, "online")
                except wandb.errors.Error as error:
                    trouble = f"{type(error).__name__}: {error}".splitlines()[0]
                    wandb.teardown()  # its service still holds the id of the run that failed
        if trouble:
            self._warn(
                f"W&B does not answer ({trouble}): offline; 'wandb sync {self._run / 'wandb'}/*' uploads it later"
            )
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        tracked = wandb.init(
            project=self._config.wandb_project,
            name=self._config.wandb_name or self._run.name,
            id=self.id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(self._run),
            config=self._settings,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=INIT_SECONDS, x_disable_stats=mode != "online"
            ),
        )
        tracked.define_metric("samples_seen")
        tracked.define_metric("*", step_metric="samples_seen")
        return tracked


def unreachable(url: str) -> str:
    """Why a server cannot be used, "" if it answers. W&B itself would try for minutes, even at the end of the run."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"{url}: {error}" if error.code >= 500 else ""  # any other answer is one
    except (OSError, ValueError) as error:
        return f"{url}: {getattr(error, 'reason', error)}"
    return ""


def _new_id() -> str:
    import secrets

    return secrets.token_hex(4)
