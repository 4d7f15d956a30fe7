"""A run in a few lines: what it came to, and what a person should know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distcnn.console import duration, percent
from distcnn.report.gather import RunFacts
from distcnn.results import gauge_rows
from distcnn.text import counted

SLOW_DATA = 0.2  # share of the time waited for data from which it is worth saying
POOR_CALIBRATION = 0.05


def summary(run: RunFacts) -> dict[str, str]:
    """What it is -> its value, in the order in which it is shown. Only what is known."""
    rows = {"state": run.status.state}
    rows |= _scores(run) | _progress(run) | _identity(run) | _history(run)
    return rows


def _scores(run: RunFacts) -> dict[str, str]:
    rows = {}
    top1, low, high = (run.last_value(f"val/{name}") for name in ("top1", "top1_low", "top1_high"))
    if top1 is not None:
        interval = f"  [{percent(low)}, {percent(high)}]" if low is not None and high is not None else ""
        samples = run.last_value("val/samples")
        rows["top-1"] = percent(top1) + interval + (f" of {samples:,.0f} images" if samples else "")
        seen, values = run.series("val/top1")
        best = int(values.argmax())
        epochs = [row.get("epoch") for row in run.rows if row["samples_seen"] == seen[best] and "val/top1" in row]
        rows["best top-1"] = percent(float(values[best])) + (f" after epoch {epochs[0]}" if epochs else "")
    for name, title, form in (
        ("val/loss", "validation loss", "{:.4f}"),
        ("train/loss", "training loss", "{:.4f}"),
    ):
        value = run.last_value(name)
        if value is not None:
            rows[title] = form.format(value)
    for name, title in (("val/top5", "top-5"), ("val/calibration_error", "calibration error")):
        value = run.last_value(name)
        if value is not None:
            rows[title] = percent(value)
    return rows


def _progress(run: RunFacts) -> dict[str, str]:
    told = run.status.rows
    rows: dict[str, str] = {name: told[name] for name in ("step", "left") if name in told}
    if run.rows:
        rows["samples seen"] = f"{run.rows[-1]['samples_seen']:,}"
    if run.wall_seconds is not None:
        rows["wall time"] = duration(run.wall_seconds)
    pace = run.speed()
    if pace:
        rows["speed"] = f"{pace:,.0f} images/s"
    gauged = {name: run.last_value(f"perf/{name}") for name in ("mfu", "gpu_memory_bytes", "gpu_reserved_bytes")}
    known = {name: value for name, value in gauged.items() if value is not None}
    return rows | gauge_rows(known | {name: run.results[name] for name in known if name in run.results})


def _identity(run: RunFacts) -> dict[str, str]:
    config, machine = run.config, run.machine
    samples = machine.get("samples") or {}
    sizes = ", ".join(f"{counted(count, 'image')} in {name}" for name, count in samples.items())
    rows = {"data set": str(config.data.data) + (f": {sizes}" if sizes else "")}
    if run.classes:
        rows["classes"] = f"{run.classes:,}"
    if machine.get("fingerprint"):
        rows["fingerprint"] = str(machine["fingerprint"])[:12]
    parameters = machine.get("parameters")
    rows["network"] = config.model.model + (f", {counted(parameters, 'parameter')}" if parameters else "")
    geometry = config.geometry
    batch = f"global batch {geometry.global_batch} in {counted(geometry.lanes, 'lane')} of {geometry.tile}"
    rows["optimiser"] = f"{config.optim.optimizer}, learning rate {config.optim.lr:g}, {batch}, seed {config.run.seed}"
    if run.sessions:
        rows["processes"] = f"{run.sessions[-1].world_size} on {machine.get('hardware', '?')}"
    rows["commit"] = commit_of(machine)
    return rows


def _history(run: RunFacts) -> dict[str, str]:
    if not run.sessions:
        return {}
    lost = run.lost_steps
    if not lost:
        return {"resumed": "never"}
    known = [steps for steps in lost if steps is not None]
    unknown = f", not known of {len(lost) - len(known)}" if len(known) < len(lost) else ""
    return {"resumed": counted(len(lost), "time"), "steps made twice": f"{sum(known):,}{unknown}"}


def commit_of(facts: Mapping[str, Any]) -> str:
    """The commit that a process ran, and whether the code was changed since; "-" if not known."""
    git = facts.get("git") or {}
    return f"{git['commit'][:10]}{' with changes' if git.get('changed') else ''}" if "commit" in git else "-"


def advice(run: RunFacts) -> list[tuple[str, str]]:
    """(warning, notice or good; a sentence) of what a person should know before the figures."""
    found = []
    state, detail = run.status.state, run.status.detail
    if state in ("dead", "failed", "stopped"):
        again = "" if "same command" in detail else "; the same command goes on from its last checkpoint"
        found.append(("notice" if state == "stopped" else "warning", f"{state}: {detail or 'no sign of life'}{again}"))
    if state in ("running", "queued"):
        found.append(("notice", f"{state}: this page shows what was known when it was made"))
    if not run.rows:
        found.append(("notice", "nothing is measured yet"))
    left_out = int(run.last_value("train/left_out") or 0)
    if left_out:
        steps = counted(left_out, "step")
        found.append(("warning", f"{steps} left out: loss or gradient was not finite (see blackbox/)"))
    if run.quarantined:
        found.append(("warning", f"{counted(run.quarantined, 'sample')} could not be read (see quarantine.jsonl)"))
    wait = run.shares().get("wait", 0.0)
    if wait > SLOW_DATA:
        found.append(("notice", f"{percent(wait)} of the training time was spent waiting for data"))
    calibration = run.last_value("val/calibration_error")
    if calibration is not None and calibration > POOR_CALIBRATION:
        found.append(("notice", f"confidences are off by {percent(calibration)} in the mean (calibration error)"))
    return found + [("warning", note) for note in run.notes]
