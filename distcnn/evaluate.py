"""Exact evaluation: fixed tiles, every sample once, the same numbers from any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from distcnn.augment import Augment
from distcnn.config import TestTimeViews
from distcnn.console import Advance
from distcnn.data.loader import Loader, TileRequest
from distcnn.data.order import evaluation_tiles
from distcnn.distributed import Runtime
from distcnn.errors import DataError
from distcnn.metrics import Evaluation, rows_of, sort_rows
from distcnn.tta import averaged


@torch.inference_mode()
def evaluate(
    runtime: Runtime,
    model: nn.Module,
    loader: Loader,
    augment: Augment,
    tile: int,
    classes: tuple[str, ...],
    advance: Advance = lambda samples, text: None,
    give_up: Callable[[], bool] = lambda: False,
    views: TestTimeViews = "none",
) -> Evaluation | None:
    """Evaluate an unwrapped `model` on the loader's whole split. Tile t of `tile` samples goes to rank t mod R.

    No rank waits for another before the end, when the rows are gathered once. The logits are the mean over the `views`
    of an image, see tta.py. `advance` is told of progress over all ranks. If `give_up` becomes true on any
    rank, the evaluation is abandoned by all: None. Raises DataError if a sample is unreadable or not counted exactly
    once.
    """
    samples = len(loader.reader)
    tiles = evaluation_tiles(samples, tile)
    mine = tiles[runtime.world.rank :: runtime.world.size]
    requests = ([TileRequest(0, t, 0, np.arange(*span))] for t, span in enumerate(mine))
    was_training = model.training
    model.eval()
    rows = [torch.zeros((0, 6), dtype=torch.float64, device=runtime.device)]
    bad_before = len(loader.stats.bad)
    given_up = False
    for (batch,) in loader.steps(requests):
        given_up = given_up or give_up()
        if given_up:
            break
        x_NCHW, targets = augment(batch, runtime.device, train=False)
        with runtime.accelerator.autocast():
            logits_NK = averaged(model, x_NCHW, views)
        rows.append(rows_of(logits_NK, batch.request.ids, targets.labels))
        advance(min(len(batch.labels) * runtime.world.size, samples), "")
    model.train(was_training)
    if runtime.sum_integers(np.array([given_up], dtype=np.int64))[0]:
        return None
    gathered = sort_rows(runtime.gather_rows(torch.cat(rows).cpu().numpy()))
    bad = int(runtime.sum_integers(np.array([len(loader.stats.bad) - bad_before]))[0])
    if bad:
        raise DataError(f"{bad} samples of the evaluation split cannot be read (see quarantine.jsonl): mend the set")
    if not np.array_equal(gathered[:, 0], np.arange(samples)):
        raise DataError(f"evaluated {len(gathered)} samples of {samples}, or some twice: this is a defect of distcnn")
    return Evaluation(gathered, classes)
