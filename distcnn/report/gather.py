"""What is known of a run, read from its folder: a finished, a running or a dead one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcnn.build import Dataset, open_dataset
from distcnn.checkpoint import FOLDER
from distcnn.config import TrainConfig, flatten, load_toml
from distcnn.data.loader import PARTS
from distcnn.data.manifest import MANIFEST_NAME
from distcnn.data.shards import SplitReader
from distcnn.errors import UserError
from distcnn.heartbeat import Heartbeat, read_all
from distcnn.outcome import BEST, LAST, Outcome, read_outcome
from distcnn.runfolder import CONFIG, METRICS, QUARANTINE, RESULTS, read_rows
from distcnn.sessions import Session, read_sessions
from distcnn.status import Status, look
from distcnn.times import RankTimes, read_times
from distcnn.world import World

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class RunFacts:
    """A run. `dataset` is None, and `missing` says why, where its data set cannot be seen from here."""

    name: str
    folder: Path
    config: TrainConfig
    status: Status
    rows: list[dict[str, Any]]
    results: dict[str, Any]
    state: dict[str, Any]
    sessions: list[Session]
    beats: list[Heartbeat]
    times: list[RankTimes]
    last: Outcome | None
    best: Outcome | None
    quarantined: int
    dataset: Dataset | None
    missing: str = ""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def machine(self) -> dict[str, Any]:
        """What the last process said of itself, or the checkpoint where none did."""
        return dict(self.sessions[-1].facts) if self.sessions else dict(self.state)

    @property
    def classes(self) -> int:
        """How many there are; 0 if not known."""
        known = self.last.classes if self.last else self.state.get("classes", ())
        return len(known)

    def series(self, name: str) -> tuple[Numbers, Numbers]:
        """(samples seen, value) of a column of metrics.jsonl, where it has a number."""
        pairs = [(row["samples_seen"], row[name]) for row in self.rows if _is_number(row.get(name))]
        both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def last_value(self, name: str) -> float | None:
        """The last number of a column."""
        values = self.series(name)[1]
        return float(values[-1]) if len(values) else None

    @property
    def wall_seconds(self) -> float | None:
        """Over all sessions, as far as their ends are known; of a run that goes on, until now."""
        if not self.sessions:
            return self.results.get("wall_seconds")
        ends = [session.end for session in self.sessions]
        if self.status.alive:
            ends[-1] = time.time()
        known = [end - s.begin for s, end in zip(self.sessions, ends, strict=True) if end is not None]
        return float(sum(max(seconds, 0.0) for seconds in known)) if known else None

    @property
    def lost_steps(self) -> list[int | None]:
        """For each resumption, the steps that were made twice; None where it is not known."""
        pairs = zip(self.sessions, self.sessions[1:], strict=False)
        return [before.lost(after) for before, after in pairs]

    def speed(self) -> float | None:
        """Images per second in training, without evaluations."""
        if "images_per_second" in self.results:
            return float(self.results["images_per_second"])
        spent = self._seconds()
        return float(spent[0].sum() / spent[1].sum()) if len(spent[0]) and spent[1].sum() > 0 else None

    def shares(self) -> dict[str, float]:
        """Seconds of each part of the loading for each second of training, over the whole run; {} if not known."""
        _, seconds = self._seconds()
        found: dict[str, float] = {}
        for part in PARTS:
            values = self.series(f"perf/{part}_share")[1]
            if len(values) == len(seconds) and seconds.sum() > 0:
                found[part] = float((values * seconds).sum() / seconds.sum())
        return found

    def _seconds(self) -> tuple[Numbers, Numbers]:
        """(samples, seconds) of each row of training, from its speed."""
        seen, speed = self.series("perf/images_per_second")
        samples = np.maximum(np.diff(seen, prepend=0.0), 0.0)
        return samples, np.divide(samples, speed, out=np.zeros_like(samples), where=speed > 0)


def gather(folders: Sequence[Path], data: Path | None = None) -> list[RunFacts]:
    """The facts of run folders, by names that differ. `data`: where the data set lies, if it has moved.

    Raises UserError for a folder that holds no run.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UserError("the same run folder is named twice")
    unique = len({folder.name for folder in resolved}) == len(resolved)
    return [_facts(folder, folder.resolve().name if unique else str(folder), data) for folder in folders]


def _facts(folder: Path, name: str, data: Path | None) -> RunFacts:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}")
    config = load_toml(folder / CONFIG)
    notes: list[str] = []
    rows = read_rows(folder / METRICS)
    state = _json(folder / FOLDER / "latest" / "state.json")
    sessions = read_sessions(folder)
    fingerprint = sessions[-1].facts.get("fingerprint") if sessions else state.get("identity", {}).get("fingerprint")
    dataset, missing = _dataset(config, data, fingerprint)
    return RunFacts(
        name=name,
        folder=folder,
        config=config,
        status=look(folder),
        rows=[row for row in rows if _is_number(row.get("samples_seen"))],
        results=_json(folder / RESULTS),
        state=state,
        sessions=sessions,
        beats=read_all(folder),
        times=read_times(folder),
        last=_outcome(folder, LAST, notes),
        best=_outcome(folder, BEST, notes),
        quarantined=len(read_rows(folder / QUARANTINE)),
        dataset=dataset,
        missing=missing,
        notes=notes,
    )


def _outcome(folder: Path, name: str, notes: list[str]) -> Outcome | None:
    try:
        return read_outcome(folder, name)
    except UserError as error:
        notes.append(str(error))
        return None


def _dataset(config: TrainConfig, data: Path | None, fingerprint: str | None) -> tuple[Dataset | None, str]:
    """The data set that a run was trained on, or None and why not."""
    if data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    where = config.data.data
    if not (where / MANIFEST_NAME).is_file():
        return None, f"the data set is not at {where} (--data says where it is)"
    try:
        dataset = open_dataset(config, World())
    except UserError as error:
        return None, str(error)
    if fingerprint and dataset.manifest.fingerprint() != fingerprint:
        return None, f"{where} is not the data set that was trained on (--data says where that is)"
    return dataset, ""


def validation_reader(run: RunFacts) -> SplitReader | None:
    """What reads the samples that were evaluated; None where they cannot be seen from here."""
    if run.dataset is None:
        return None
    return SplitReader(run.dataset.root, run.dataset.manifest.split(run.config.data.val_split))


def differences(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the settings in which the runs differ; not where they lie."""
    flat = [flatten(run.config) for run in runs]
    names = [name for name in flat[0] if name != "output" and any(other[name] != flat[0][name] for other in flat)]
    return [(name, [spoken(values[name]) for values in flat]) for name in names]


def spoken(value: Any) -> str:
    """A setting as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
