"""TensorBoard as a second mirror of metrics.jsonl, by Accelerate's tracker of it.

DISTCNN_TENSORBOARD=1, and `pip install distcnn[tensorboard]`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distcnn.distributed import tensorboard_tracker
from distcnn.state import Position

FOLDER = "tensorboard"
PLACE = ("step", "epoch", "samples_seen")


class TensorBoardMirror:
    """Repeats rows in the run folder, over samples seen. Whatever fails there becomes one warning, and nothing else."""

    def __init__(self, run: Path, settings: Mapping[str, Any], position: Position, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._tracker: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            warn("DISTCNN_TENSORBOARD is set, but tensorboard is not installed: pip install distcnn[tensorboard]")
            return
        with self._guarded():
            # What an earlier process wrote beyond the checkpoint is not shown.
            purge = position.samples + 1 if position.total else None
            self._tracker = tensorboard_tracker(run / FOLDER, purge_step=purge)
            # As text: `store_init_configuration` would show each start of a run as another run.
            self._tracker.log(
                {"settings": f"```json\n{json.dumps(dict(settings), indent=1)}\n```"}, step=position.samples
            )

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row; it has `samples_seen`."""
        values = {name: value for name, value in row.items() if name not in PLACE and isinstance(value, int | float)}
        with self._guarded():
            if self._tracker:
                self._tracker.log(values, step=row["samples_seen"])

    def close(self) -> None:
        """Write what is still waiting."""
        with self._guarded():
            if self._tracker:
                self._tracker.finish()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """After the first failure nothing is written any more."""
        try:
            yield
        except Exception as error:  # TensorBoard is a mirror: nothing that happens there may end a training run
            self._warn(f"TensorBoard stopped ({type(error).__name__}: {error})")
            self._tracker = None
