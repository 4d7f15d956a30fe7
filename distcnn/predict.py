"""`distcnn predict`: images in, a table out, in the order of the input, from any number of processes."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from distcnn.classifier import BATCH, Classifier, Prediction, find_checkpoint, load_model
from distcnn.config import RunConfig
from distcnn.console import Console, duration
from distcnn.data.order import evaluation_tiles
from distcnn.data.readers import open_images
from distcnn.distributed import Runtime, process_cores
from distcnn.errors import UserError
from distcnn.files import write_atomically
from distcnn.world import read_world

if TYPE_CHECKING:
    from distcnn.commands.predict import Options

SHOWN = 5  # unreadable images that are named on the console; the table has all


def predict_table(options: Options) -> int:
    """Predict what the options name and write the table. Raises UserError for input that cannot be used."""
    if options.top_k < 1 or options.threads < 1:
        raise UserError("--top-k and --threads must be >= 1")
    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")
    world = read_world()
    find_checkpoint(options.checkpoint)
    reader = open_images(options.inputs, options.images, options.image_column, options.split)
    runtime = Runtime(RunConfig(), world, max(process_cores() // world.local_size, 1))
    try:
        console = Console(world.is_main)
        model = load_model(options.checkpoint, options.ema, str(runtime.device))
        started = time.monotonic()
        tiles = evaluation_tiles(len(reader), BATCH)[world.rank :: world.size]
        rows: list[list[float]] = []
        errors: dict[int, str] = {}
        with console.progress("predict", len(reader)) as advance:
            for ids, logits_NK, reasons in model.logits(reader, tiles, options.threads, options.tta):
                best = logits_NK.float().softmax(1).topk(min(options.top_k, len(model.classes)), dim=1)
                values = zip(ids.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
                rows += [[number, *classes, *shares] for number, classes, shares in values]
                errors |= {int(i): reason for i, reason in zip(ids, reasons, strict=True) if reason}
                advance(min(len(ids) * world.size, len(reader)), "")
        found = runtime.gather_rows(np.array(rows, dtype=np.float64).reshape(len(rows), -1))
        bad = runtime.gather_rows(np.array([[float(i)] for i in errors], dtype=np.float64).reshape(-1, 1))
        if world.is_main:
            predictions = _in_order(
                model, reader.keys(np.arange(len(reader))), found, set(bad[:, 0].astype(int).tolist())
            )
            _write(options, predictions)
            _report(console, options, predictions, errors, time.monotonic() - started)
        runtime.barrier()
    finally:
        runtime.close()
    return 0


def _in_order(model: Classifier, keys: Any, found: Any, bad: set[int]) -> list[Prediction]:
    """Predictions by id from gathered (n, 1 + 2k) rows of id, k classes, k probabilities."""
    by_id: list[Prediction] = [Prediction(name, (), (), "not predicted") for _, name in keys]
    k = (found.shape[1] - 1) // 2
    for row in found:
        number = int(row[0])
        labels = tuple(model.classes[int(c)] for c in row[1 : 1 + k])
        known = number not in bad
        by_id[number] = Prediction(
            keys[number][1],
            labels if known else (),
            tuple(row[1 + k :].tolist()) if known else (),
            "" if known else "cannot be read",
        )
    return by_id


def _write(options: Options, predictions: list[Prediction]) -> None:
    """The table: one row an image; an unreadable one has an empty class."""
    if options.output.suffix.lower() == ".json":
        rows = [
            {"name": p.name, "classes": list(p.labels), "probabilities": list(p.probabilities), "error": p.error}
            for p in predictions
        ]
        write_atomically(options.output, (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
        return
    more = [name for k in range(2, options.top_k + 1) for name in (f"{options.label_column}_{k}", f"probability_{k}")]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([options.image_column, options.label_column, "probability", *more])
    for p in predictions:
        shares = ["" if math.isnan(p.probability) else f"{share:.6f}" for share in p.probabilities]
        rest = [cell for pair in zip(p.labels[1:], shares[1:], strict=True) for cell in pair]
        table.writerow([p.name, p.label, shares[0] if shares else "", *rest])
    write_atomically(options.output, text.getvalue().encode())


def _report(
    console: Console, options: Options, predictions: list[Prediction], errors: dict[int, str], seconds: float
) -> None:
    bad = [number for number, p in enumerate(predictions) if p.error]
    for number in bad[:SHOWN]:
        console.warn(f"{predictions[number].name}: {errors.get(number, 'cannot be read')}")
    if len(bad) > SHOWN:
        console.warn(f"... and {len(bad) - SHOWN} more that cannot be read; their rows have no class")
    speed = len(predictions) / max(seconds, 1e-9)
    console.say(
        f"{len(predictions):,} images in {duration(seconds)} ({speed:,.0f} images/s), {len(bad)} of them unreadable:"
        f" {options.output}"
    )
