"""How a run ends: results.json, and a short table for the person who started it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distcnn import __version__, checkpoint
from distcnn.config import flatten
from distcnn.console import duration, percent
from distcnn.data.shards import SplitReader
from distcnn.errors import EXIT_PREEMPTED
from distcnn.files import binary_size
from distcnn.metrics import Evaluation
from distcnn.outcome import FOLDER as OUTCOMES
from distcnn.outcome import Outcome, outcome_of, write_outcome
from distcnn.preempt import Preempted
from distcnn.runfolder import RESULTS
from distcnn.samples import read_pictures
from distcnn.sessions import git_state, processor
from distcnn.tracking import Ending

if TYPE_CHECKING:
    from distcnn.job import Job


def versions() -> dict[str, str]:
    """What the run was made with. Read from the installation: importing torchvision would take longer than a step."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "simplejpeg")
    return {
        "distcnn": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def run_facts(job: Job) -> dict[str, Any]:
    """What a checkpoint says of its run, enough to predict with it: config, classes, preprocessing, versions."""
    return {
        "config": flatten(job.config),
        "classes": list(job.dataset.classes),
        "samples": {name: split.samples for name, split in job.dataset.manifest.splits.items()},
        "preprocessing": {
            "size": job.dataset.size,
            "view": job.val_loader.view.kind,
            "mean": list(job.dataset.mean),
            "std": list(job.dataset.std),
        },
        "teacher": job.teacher.facts() if job.teacher else None,
        "world_size": job.runtime.world.size,
        "versions": versions(),
    }


def machine_facts(job: Job) -> dict[str, Any]:
    """What this process runs on, and with: data, network, device, versions, the commit of the code."""
    gpu = job.runtime.device.type == "cuda"
    return {
        "fingerprint": job.identity.fingerprint,
        "samples": {name: split.samples for name, split in job.dataset.manifest.splits.items()},
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "hardware": torch.cuda.get_device_name(job.runtime.device) if gpu else processor(),
        "compute_threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_state(),
    }


def keep_outcome(job: Job, evaluation: Evaluation, best: bool) -> None:
    """Write what an evaluation found to the run folder; rank 0 does so. A full disk is a warning."""
    try:
        write_outcome(job.run, outcome_here(job, evaluation), best)
    except OSError as error:
        job.console.warn(f"{job.run / OUTCOMES} cannot be written ({error.strerror or error})")


def outcome_here(job: Job, evaluation: Evaluation) -> Outcome:
    """What is kept of an evaluation made at the job's position."""
    return outcome_of(evaluation, job.config.data.val_split, job.position, job.val_loader.reader.keys)


def finish(job: Job, evaluation: Evaluation | None, seconds: float) -> dict[str, Any]:
    """Write results.json, close the trackers, print the table. Returns what results.json holds (on every rank)."""
    assert evaluation is not None, "the last epoch is always evaluated"
    values = evaluation.summary()
    results: dict[str, Any] = {
        "status": "complete",
        **{f"val/{name}": value for name, value in values.items() if name != "samples"},
        "best/top1": job.best["top1"],
        "best/epoch": job.best["epoch"],
        "train_samples": len(job.loader.reader),
        "val_samples": evaluation.samples,
        "epochs": job.position.epoch,  # fewer than asked for where --patience ended it
        "steps": job.position.total,
        "wall_seconds": round(seconds, 3),
        "images_per_second": round(job.meter.total_samples / max(job.meter.total_seconds, 1e-9), 1),
        "world_size": job.runtime.world.size,
        "device": job.runtime.device.type,
        "seed": job.config.run.seed,
        "per_class": evaluation.per_class(),
        "confusion": evaluation.confusion().tolist(),
        "versions": versions(),
    }
    gauged = job.gauge.row(results["images_per_second"])
    results |= {name.removeprefix("perf/"): value for name, value in gauged.items()}
    if job.is_main:
        checkpoint.write_json(job.run / RESULTS, results)
        if job.tracker:
            plain = {name: value for name, value in results.items() if isinstance(value, str | int | float)}
            job.tracker.close(plain, _ending(job, evaluation))
    show(job, results, f"finished: {job.run}")
    return results


def _ending(job: Job, evaluation: Evaluation) -> Ending:
    """What W&B gets of a finished run besides its rows."""
    reader = job.val_loader.reader
    folder = job.run / checkpoint.FOLDER
    manifest = job.dataset.manifest
    return Ending(
        outcome=outcome_here(job, evaluation),
        pictures=lambda ids: read_pictures(reader, ids) if isinstance(reader, SplitReader) else {},
        checkpoints={alias: folder / alias for alias in ("best", "latest") if (folder / alias).exists()},
        dataset={
            "name": manifest.name,
            "fingerprint": job.identity.fingerprint,
            "classes": list(manifest.classes),
            "samples": {name: split.samples for name, split in manifest.splits.items()},
        },
    )


def report_stopped(job: Job, request: Preempted, seconds: float) -> None:
    """Say where a run that was asked to stop stands, for the person and for the launch scripts (results.json)."""
    at = job.position
    if job.is_main:
        checkpoint.write_json(
            job.run / RESULTS,
            {
                "status": "stopped",
                "reason": request.reason,
                "saved": request.saved,
                "epoch": at.epoch,
                "step": at.total,
                "exit_code": EXIT_PREEMPTED,
                "wall_seconds": round(seconds, 3),
                "world_size": job.runtime.world.size,
            },
        )
        if job.tracker:
            job.tracker.close()
    saved = f"saved at step {at.total}" if request.saved else "no time to save: the last checkpoint stands"
    job.console.say(f"stopped ({request.reason}), {saved}; the same command goes on from there (exit code 75)")


def report_known(job: Job) -> dict[str, Any] | None:
    """Show the results of a run that is complete already; None where it was ended before it wrote them."""
    known: dict[str, Any] | None = job.runtime.broadcast(_complete_results(job.run) if job.is_main else None)
    if known:
        show(job, known, f"complete already: {job.run} (--resume never trains it anew, --output elsewhere)")
    return known


def _complete_results(run: Path) -> dict[str, Any] | None:
    try:
        results: dict[str, Any] = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results if results.get("status") == "complete" else None


def gauge_rows(results: Mapping[str, Any]) -> dict[str, str]:
    """What a GPU was used for, as far as results.json, or the end of a name in metrics.jsonl, tells it."""
    rows = {}
    if "mfu" in results:
        rows["MFU"] = f"{percent(results['mfu'])} of the peak is the network's own arithmetic"
    if "gpu_memory_bytes" in results:
        used, held = (binary_size(int(results[f"gpu_{kind}_bytes"])) for kind in ("memory", "reserved"))
        rows["GPU memory"] = f"{used} at most, {held} reserved"
    return rows


def show(job: Job, results: dict[str, Any], title: str) -> None:
    """The short table at the end."""
    low, high = percent(results["val/top1_low"]), percent(results["val/top1_high"])
    rows = {
        "top-1": f"{percent(results['val/top1'])}  [{low}, {high}] of {results['val_samples']:,} images",
        "loss": f"{results['val/loss']:.4f}",
        "best": f"{percent(results['best/top1'])} after epoch {int(results['best/epoch']) + 1}",
        "speed": f"{results['images_per_second']:,.0f} images/s",
        **gauge_rows(results),
        "wall time": duration(results["wall_seconds"]),
        "run": str(job.run),
        "try next": f"distcnn report {job.run}, torchrun --nproc-per-node=2 train.py, distcnn --help",
    }
    job.console.table(title, rows)
