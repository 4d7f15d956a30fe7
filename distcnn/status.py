"""How a run stands, read from its folder and from SLURM: live or dead, how far, and until when. Changes nothing."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distcnn import slurm
from distcnn.checkpoint import FOLDER, step_of
from distcnn.config import TrainConfig, load_toml
from distcnn.console import duration, percent
from distcnn.data.balance import epoch_samples
from distcnn.data.manifest import load_manifest
from distcnn.data.order import EpochOrder
from distcnn.errors import UserError
from distcnn.heartbeat import OVER, Heartbeat, read_all
from distcnn.runfolder import CONFIG, METRICS, RESULTS, read_rows
from distcnn.times import PARTS, read_times

QUIET_SECONDS = 30.0  # without a heartbeat; files of other nodes may come late
STARTS = "slurm.jsonl"  # written by launch/batch.sh, a line a start
PLACE = ("step", "epoch", "samples_seen")  # a row without these is none of ours
RECENT_ROWS = 20  # that the speed is taken from


@dataclass(frozen=True)
class Status:
    """What is known of a run. `state`: complete, running, queued, stopped, failed, dead or not begun."""

    run: Path
    state: str
    detail: str = ""
    rows: dict[str, str] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.state in ("running", "queued")


def look(run: Path) -> Status:
    """The status of a run folder. Raises UserError if it is none."""
    starts = read_rows(run / "logs" / STARTS)
    if not (run / CONFIG).exists() and not starts:
        raise UserError(f"{run} is no run folder: it has neither {CONFIG} nor logs/{STARTS}")
    facts = slurm.job_facts(starts[-1]["job"]) if starts else {}
    beats, results = read_all(run), _json(run / RESULTS)
    state, detail = judge(beats, results, facts, (run / CONFIG).exists())
    rows = _slurm_rows(starts, facts)
    metrics = [row for row in read_rows(run / METRICS) if all(isinstance(row.get(name), int) for name in PLACE)]
    if metrics:
        rows |= _progress_rows(run, metrics, results, state)
    rows |= _time_rows(run) | _checkpoint_rows(run)
    if state == "running":
        rows |= _rank_rows(beats)
    return Status(run, state, detail, rows)


def judge(
    beats: Sequence[Heartbeat], results: Mapping[str, Any], facts: Mapping[str, str], begun: bool
) -> tuple[str, str]:
    """(state, detail) from what the ranks, the results and SLURM say. The living are believed first."""
    alive = [beat for beat in beats if is_alive(beat)]
    job = facts.get("JobState", "")
    if alive:
        return "running", f"{len(alive)} of {alive[0].size} processes give signs of life"
    if results.get("status") == "complete":
        return "complete", ""
    if job == "PENDING":
        return "queued", f"waits for {facts.get('Reason', 'its turn')}, from {facts.get('StartTime', 'some time')} on"
    if job in ("RUNNING", "CONFIGURING") and not any(beat.phase in OVER for beat in beats):
        return "running", "on its way: no process has spoken yet"
    failed = [beat for beat in beats if beat.error]
    if failed:
        return "failed", f"{failed[0].who()}, {failed[0].place()}: {failed[0].error}"
    if results.get("status") == "stopped":
        saved = f"saved at step {results['step']:,}" if results.get("saved") else "not saved"
        return "stopped", f"{results.get('reason', '')}, {saved}; the same command goes on"
    if beats:
        latest = min(beats, key=lambda beat: beat.age_seconds)
        return "dead", f"no sign of life for {duration(latest.age_seconds)}, last of {latest.who()}, {latest.place()}"
    if job and job != "COMPLETED":
        return "failed", f"SLURM: {job} ({facts.get('Reason', '')}, exit code {facts.get('ExitCode', '?')})"
    return ("dead", "no sign of life") if begun else ("not begun", "")


def is_alive(beat: Heartbeat) -> bool:
    """Whether a rank still runs, as far as can be seen."""
    return beat.phase not in OVER and not beat.has_died() and beat.age_seconds < QUIET_SECONDS


def seconds_left(rows: Sequence[Mapping[str, Any]], total_samples: int) -> float | None:
    """Seconds of training left at the speed of the last rows, None where it is not known. Rows of metrics.jsonl.

    Evaluations are not in it: they count neither in the samples nor in the speed.
    """
    recent = [row for row in rows if row.get("perf/images_per_second")][-RECENT_ROWS:]
    if not recent:
        return None
    # A row's speed holds for the samples since the row before: so the mean is over the time, not over the rows.
    seen = [row["samples_seen"] for row in recent]
    parts = [int(after - before) for before, after in itertools.pairwise(seen)] or [1]
    speeds = [float(row["perf/images_per_second"]) for row in (recent[1:] or recent)]
    spent = sum(part / speed for part, speed in zip(parts, speeds, strict=True))
    return float(max(total_samples - seen[-1], 0) * spent / max(sum(parts), 1))


def _slurm_rows(starts: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> dict[str, str]:
    if not starts:
        return {}
    last = starts[-1]
    job = f"{last['job']} {facts.get('JobState', 'not known to SLURM (any more)')}"
    if facts.get("JobState") == "RUNNING":
        job += f" for {facts['RunTime']} of {facts['TimeLimit']} on {facts.get('NodeList', '?')}"
    return {"job": job, "starts": f"{len(starts)}, the last {duration(max(time.time() - last['time'], 0))} ago"}


def _progress_rows(
    run: Path, metrics: Sequence[Mapping[str, Any]], results: Mapping[str, Any], state: str
) -> dict[str, str]:
    last = metrics[-1]
    rows = {"step": f"{last['step']:,} (epoch {last['epoch'] + 1})"}
    config = load_toml(run / CONFIG)
    length = _length(config, results)
    if length:
        steps, samples = length
        done = min(last["samples_seen"] / max(samples, 1), 1.0)
        epoch = min(last["epoch"] + 1, config.optim.epochs)
        rows["step"] = f"{last['step']:,} of {steps:,} (epoch {epoch} of {config.optim.epochs}), {percent(done)}"
        left = seconds_left(metrics, samples)
        if left is not None and state in ("running", "queued", "stopped"):
            rows["left"] = f"about {duration(left)} of training"
    for name, title in (("train/loss", "loss"), ("perf/images_per_second", "images/s"), ("val/top1", "top-1")):
        value = next((row[name] for row in reversed(metrics) if name in row), None)
        if value is not None:
            rows[title] = percent(value) if title == "top-1" else f"{value:,.4g}"
    return rows


def _length(config: TrainConfig, results: Mapping[str, Any]) -> tuple[int, int] | None:
    """(steps, samples) of the whole run; None if its data set cannot be seen from here."""
    import numpy as np

    if results.get("status") == "complete":
        return int(results["steps"]), int(results["train_samples"]) * int(results["epochs"])
    try:
        split = load_manifest(config.data.data).split(config.data.train_split)
    except UserError:
        return None
    order = EpochOrder(np.array([epoch_samples(split, config.optim.balance)]), config.geometry, config.run.seed, 0)
    return order.steps * config.optim.epochs, order.samples * config.optim.epochs


def _time_rows(run: Path) -> dict[str, str]:
    """Where the time of the steps went, in the mean of the ranks; and which rank waited most for its data."""
    ranks = read_times(run)
    if not ranks:
        return {}
    whole = sum(rank.whole for rank in ranks) or 1.0
    means = [f"{part} {sum(rank.seconds[part] for rank in ranks) / whole:.0%}" for part in PARTS]
    most = max(ranks, key=lambda rank: rank.share("data"))
    several = f"; data at most {most.share('data'):.0%}, of rank {most.rank}" if len(ranks) > 1 else ""
    return {"time": ", ".join(means) + several}


def _checkpoint_rows(run: Path) -> dict[str, str]:
    folder = run / FOLDER
    steps = sorted(path for path in folder.glob("step_*") if step_of(path) >= 0) if folder.is_dir() else []
    if not steps:
        return {"checkpoint": "none yet"}
    newest = max(steps, key=step_of)
    age = max(time.time() - newest.stat().st_mtime, 0)
    return {"checkpoint": f"step {step_of(newest):,}, {duration(age)} ago"}


def _rank_rows(beats: Sequence[Heartbeat]) -> dict[str, str]:
    """The rank that is furthest behind, where there are several; and those that say nothing."""
    rows = {}
    silent = [beat for beat in beats if not is_alive(beat)]
    if silent:
        rows["silent"] = f"{len(silent)}: {silent[0].who()}, {silent[0].place()}"
    if len(beats) > 1:
        slowest = min(beats, key=lambda beat: (beat.total, beat.rank))
        rows["behind"] = f"{slowest.who()}, {slowest.place()}, for {slowest.phase_seconds:.0f} s"
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
