"""`distcnn evaluate`: exact metrics of checkpoints on a labelled split."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distcnn.classifier import BATCH, Classifier, load_model
from distcnn.config import RunConfig
from distcnn.console import Console, percent
from distcnn.data.manifest import load_manifest
from distcnn.data.order import evaluation_tiles
from distcnn.data.shards import SplitReader
from distcnn.distributed import Runtime, process_cores
from distcnn.errors import DataError, UserError
from distcnn.files import write_atomically
from distcnn.metrics import CONFIDENCE, LABEL, LOSS, PREDICTED, Evaluation, rows_of, sort_rows
from distcnn.world import read_world

if TYPE_CHECKING:
    from distcnn.commands.evaluate import Options


def score(options: Options) -> int:
    """Evaluate what the options name, print the metrics, write what was asked for."""
    world = read_world()
    manifest = load_manifest(options.data)
    split = manifest.split(options.split)
    if not split.labelled:
        raise DataError(f"{options.data}: split {options.split!r} has no labels; 'distcnn predict' is for those")
    for file in (options.output, options.predictions):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {file.parent}")
    reader = SplitReader(options.data, split)
    runtime = Runtime(RunConfig(), world, max(process_cores() // world.local_size, 1))
    try:
        console = Console(world.is_main)
        paths = [options.checkpoint] + ([options.compare] if options.compare else [])
        found = [_evaluate(options, runtime, console, reader, path, manifest.classes) for path in paths]
        if world.is_main:
            _report(options, console, paths, found)
            if options.predictions:
                write_atomically(options.predictions, _rows_csv(reader, found[0]).encode())
        runtime.barrier()
    finally:
        runtime.close()
    return 0


def _evaluate(
    options: Options, runtime: Runtime, console: Console, reader: SplitReader, path: Path, classes: tuple[str, ...]
) -> Evaluation:
    model = load_model(path, options.ema, str(runtime.device))
    _check_classes(model, classes, path, options.data)
    samples, world = len(reader), runtime.world
    rows = [torch.zeros((0, 6), dtype=torch.float64)]
    tiles = evaluation_tiles(samples, BATCH)[world.rank :: world.size]
    with console.progress(f"evaluate {path}", samples) as advance:
        for ids, logits_NK, errors in model.logits(reader, tiles, options.threads, options.tta):
            for number, error in zip(ids, errors, strict=True):
                if error:
                    shard, key = reader.keys(np.array([number]))[0]
                    raise DataError(f"shard {shard}, sample {key!r} cannot be read ({error}): mend or leave it out")
            labels_N = torch.from_numpy(reader.labels(ids)).to(logits_NK.device)
            rows.append(rows_of(logits_NK, ids, labels_N).cpu())
            advance(min(len(ids) * world.size, samples), "")
    gathered = sort_rows(runtime.gather_rows(torch.cat(rows).numpy()))
    if not np.array_equal(gathered[:, 0], np.arange(samples)):
        raise RuntimeError(f"evaluated {len(gathered)} samples of {samples}, or some twice: a defect of distcnn")
    return Evaluation(gathered, classes)


def _check_classes(model: Classifier, classes: tuple[str, ...], path: Path, data: Path) -> None:
    if model.classes != classes:
        other = next((pair for pair in zip(model.classes, classes, strict=False) if pair[0] != pair[1]), None)
        what = f"class {other[0]!r} is {other[1]!r} there" if other else f"{len(model.classes)} and {len(classes)}"
        raise DataError(f"{path} was trained on other classes than those of {data} ({what})")


def mcnemar(first: Evaluation, second: Evaluation) -> tuple[int, int, float]:
    """(right only in the first, right only in the second, p) of the exact test of equal accuracy on the same samples.

    McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 1947; the
    exact p is that of a fair coin (two-sided binomial).
    """
    from scipy.stats import binomtest

    right = [e.rows[:, LABEL] == e.rows[:, PREDICTED] for e in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    differing = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, differing).pvalue) if differing else 1.0


def _report(options: Options, console: Console, paths: list[Path], found: list[Evaluation]) -> None:
    document: dict[str, Any] = {"data": str(options.data), "split": options.split, "tta": options.tta}
    for number, (path, evaluation) in enumerate(zip(paths, found, strict=True)):
        values = evaluation.summary()
        rows = {
            "top-1": f"{percent(values['top1'])}  [{percent(values['top1_low'])}, {percent(values['top1_high'])}]",
            **({"top-5": percent(values["top5"])} if "top5" in values else {}),
            "loss": f"{values['loss']:.4f}",
            "calibration error": percent(values["calibration_error"]),
            "images": f"{evaluation.samples:,}",
        }
        classes = evaluation.per_class()
        worst = sorted(classes, key=lambda row: row["f1"])[:3]
        rows["weakest classes"] = ", ".join(f"{row['class']} (F1 {percent(row['f1'])})" for row in worst)
        console.table(f"{path} on {options.data}, {options.split}", rows)
        details = {"per_class": classes, "confusion": evaluation.confusion().tolist()}
        document["checkpoint" if number == 0 else "compare"] = {"path": str(path), **values, **details}
    if len(found) == 2:
        first, second, p = mcnemar(*found)
        console.say(f"right only in the first: {first}, only in the second: {second}; McNemar's exact p = {p:.4g}")
        document["mcnemar"] = {"only_first": first, "only_second": second, "p": p}
    if options.output:
        write_atomically(options.output, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _rows_csv(reader: SplitReader, evaluation: Evaluation) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["shard", "key", "label", "predicted", "probability", "loss"])
    keys = reader.keys(evaluation.rows[:, 0].astype(np.int64))
    for (shard, key), row in zip(keys, evaluation.rows, strict=True):
        names = (evaluation.classes[int(row[LABEL])], evaluation.classes[int(row[PREDICTED])])
        table.writerow([shard, key, *names, f"{row[CONFIDENCE]:.6f}", f"{row[LOSS]:.6f}"])
    return text.getvalue()
