"""The verification itself: prepare a small data set, run, compare, report."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distcnn.build import Dataset, open_dataset, order_of
from distcnn.config import TrainConfig, flatten
from distcnn.console import Console
from distcnn.errors import UserError
from distcnn.results import versions
from distcnn.train import EVALUATION_TILE
from distcnn.verify import data_checks, run_checks, sum_checks
from distcnn.verify.evidence import Evidence
from distcnn.verify.launch import Trace, launch_all
from distcnn.verify.plan import CHECKS, VAL_TILES, CheckName, Run, choose_processes, plan_runs, short_config
from distcnn.verify.report import CERTIFICATE, REPORT, Report, write_report
from distcnn.verify.result import Result, plural
from distcnn.verify.subset import make_subset, ragged_samples
from distcnn.world import World

WORK = "work"  # folder of the runs within the output; it stays where something has failed

CHECK_FUNCTIONS: dict[CheckName, Callable[[Evidence], Result]] = {
    "order": data_checks.check_order,
    "pixels": data_checks.check_pixels,
    "gradients": sum_checks.check_gradients,
    "batchnorm": sum_checks.check_batchnorm,
    "accumulation": sum_checks.check_accumulation,
    "schedule": run_checks.check_schedule,
    "resume": run_checks.check_resume,
    "evaluation": run_checks.check_evaluation,
    "precision": run_checks.check_precision,
    "overfit": run_checks.check_overfit,
    "finite": run_checks.check_finite,
}


@dataclass(frozen=True)
class Request:
    """What to verify. `config` is the user's; its run folder is not touched."""

    config: TrainConfig
    checks: tuple[CheckName, ...] = CHECKS
    processes: str = ""
    steps: int = 4


@dataclass(frozen=True)
class Prepared:
    """All that is known before anything runs."""

    request: Request
    processes: tuple[int, ...]
    dataset: Dataset
    small: Dataset  # what is trained on, with `steps` steps an epoch
    steps: int
    short: TrainConfig
    runs: list[Run]


def verify(request: Request, console: Console) -> Report:
    """Run and compare; returns what was found, which also lies in the output folder.

    Raises UserError for a config, data set or model that cannot be trained at all, and for an output folder that
    holds something else.
    """
    started = time.monotonic()
    config, output = request.config, output_of(request.config)
    ready = prepare(request)
    images = [d.manifest.split(config.data.train_split).samples for d in (ready.small, ready.dataset)]
    console.say(
        f"{plural(len(ready.runs), 'short run')} of {config.model.model} on {images[0]:,} of {images[1]:,} images of"
        f" {config.data.data}, {plural(ready.steps, 'step')} an epoch; then {plural(len(request.checks), 'check')}"
    )
    with console.progress("verify", len(ready.runs) + len(request.checks)) as advance:
        traces = launch_all(ready.runs, lambda trace: advance(1, _ended(trace)))
        _refuse_impossible(traces)
        evidence = Evidence(config, ready.dataset, ready.short, ready.small, ready.steps, traces)
        results = [run_checks.check_runs(evidence)]
        for name in request.checks:
            results.append(CHECK_FUNCTIONS[name](evidence))
            advance(1, f"check {name}")
    seconds = time.monotonic() - started
    runs = [_run_row(trace) for trace in traces.values()]
    exact = all(map(evidence.exact, evidence.compared))
    report = Report(results, ready.processes, _facts(evidence, seconds), flatten(config), runs, seconds, exact)
    write_report(report, output)
    if report.passed:
        shutil.rmtree(output / WORK)
    return report


def prepare(request: Request) -> Prepared:
    """Open the data, take over the output folder, and plan the runs. Raises UserError as `verify` does."""
    config = request.config
    processes = choose_processes(request.processes, config.geometry)
    if config.model.batch_norm == "sync" and processes != (1,):
        raise UserError("--batch-norm sync: its statistics depend on the processes by design, so runs differ: use tile")
    dataset = open_dataset(config, World())
    work = _claim(output_of(config)).resolve()
    small, steps = _small_set(config, dataset, work / "data", request.steps)
    short = short_config(config, work / "data", work / "runs")
    runs = plan_runs(short, request.checks, processes, steps, work)
    return Prepared(request, processes, dataset, small, steps, short, runs)


def output_of(config: TrainConfig) -> Path:
    """The folder of the verification: --output, or one beside the run folders."""
    name = f"verify-{config.data.data.resolve().name}-{config.model.model}"
    return Path(config.run.output) if config.run.output else Path("runs") / name


def _claim(output: Path) -> Path:
    """Make the output folder, or take over that of an earlier verification. Returns the folder for the runs."""
    own = {WORK, REPORT, CERTIFICATE}
    try:
        output.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in output.iterdir() if path.name not in own)
        if others:
            raise UserError(f"--output {output} holds files of something else ({others[0]}): give another folder")
        shutil.rmtree(output / WORK, ignore_errors=True)
        for name in (REPORT, CERTIFICATE):
            (output / name).unlink(missing_ok=True)
        (output / WORK).mkdir()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error
    return output / WORK


def _small_set(config: TrainConfig, dataset: Dataset, folder: Path, steps: int) -> tuple[Dataset, int]:
    """The data set of the runs, and how many steps it has an epoch."""
    train, val = config.data.train_split, config.data.val_split
    available = {name: dataset.manifest.split(name).samples for name in (train, val)}
    tile = max(config.optim.tile_size, EVALUATION_TILE)
    sizes = {val: min(available[val], round(VAL_TILES * tile))}
    sizes[train] = ragged_samples(available[train], config.geometry, steps)
    manifest = make_subset(dataset.root.resolve(), dataset.manifest, sizes, folder)
    small = Dataset(folder, manifest, dataset.size, dataset.mean, dataset.std)
    return small, order_of(config, small).steps


def _refuse_impossible(traces: dict[str, Trace]) -> None:
    """What one process cannot train, for the user's own reasons, is no finding but an error of the user's."""
    for trace in traces.values():
        for row in trace.rows("error"):
            if row["user"] and trace.processes == 1:
                raise UserError(row["text"])


def _ended(trace: Trace) -> str:
    what = f"{plural(trace.processes, 'process')} {trace.run.name if not trace.run.name.isdigit() else ''}".strip()
    return f"{what}: {'failed' if trace.trouble else f'{trace.seconds:.0f} s'}"


def _run_row(trace: Trace) -> dict[str, object]:
    return {
        "name": trace.run.name,
        "processes": trace.processes,
        "seconds": round(trace.seconds, 1),
        "trouble": trace.trouble,
    }


def _facts(evidence: Evidence, seconds: float) -> dict[str, str]:
    """What the certificate says of what was verified."""
    config, dataset = evidence.full, evidence.dataset
    train = config.data.train_split
    geometry, short = config.geometry, evidence.config
    own = versions()
    weights = [row["weights"] for row in evidence.compared[0].rows("state")][-1:] if evidence.compared else []
    facts = {
        "model": f"{config.model.model}, {len(dataset.classes)} classes, {dataset.size} px",
        "data": f"{config.data.data} ({dataset.manifest.split(train).samples:,} images,"
        f" {evidence.small.manifest.split(train).samples:,} of them trained on here)",
        "fingerprint of the data": dataset.manifest.fingerprint(),
        "a step": f"{geometry.global_batch} images, {geometry.lanes} tiles of {geometry.tile}",
        "optimizer": f"{config.optim.optimizer}, lr {config.optim.lr:g}, {config.optim.schedule}",
        "reduction": f"{config.run.reduction}, mixed precision {short.run.mixed_precision}"
        + (" (fp16 is not for CPUs)" if config.run.mixed_precision == "fp16" else ""),
        "seed": str(config.run.seed),
        "each process": f"{plural(short.run.threads, 'compute thread')}, CPU",
    }
    if weights:
        facts["weights at the end"] = f"{weights[0]} (sha256, beginning)"
    facts["machine"] = f"{platform.machine()}, {plural(os.cpu_count() or 1, 'core')}, {_processor()}"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in own.items())
    facts["time"] = f"{seconds:.0f} s"
    return facts


def _processor() -> str:
    """The CPU's name as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
