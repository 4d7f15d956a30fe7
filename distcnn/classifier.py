"""A trained network with all that it takes to use it: classes and preprocessing travel inside the checkpoint.

from distcnn import load_model
model = load_model("runs/x/checkpoints/best")
for prediction in model.predict(["a.jpg", "b.png"]):
    print(prediction.name, prediction.label, prediction.probability)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distcnn import checkpoint
from distcnn.augment import Augment
from distcnn.checkpoint import find_checkpoint as find_checkpoint
from distcnn.config import TestTimeViews, from_flat
from distcnn.data.loader import Loader, TileRequest
from distcnn.data.order import Ids, evaluation_tiles
from distcnn.data.readers import FileReader, Reader
from distcnn.data.views import View
from distcnn.models import build_plain
from distcnn.tta import averaged

BATCH = 64
PREFETCH = 2


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image: its most probable classes, best first. `error` says why there are none."""

    name: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str = ""

    @property
    def label(self) -> str:
        """The most probable class, "" for an image that could not be read."""
        return self.labels[0] if self.labels else ""

    @property
    def probability(self) -> float:
        return self.probabilities[0] if self.probabilities else math.nan


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation mode, its class names, and how images become its inputs.

    `model` is a plain torch module (of torchvision, where the checkpoint is of one of its networks): (n, 3, S, S)
    float32 in, (n, K) logits out. `normalise` makes such inputs of (n, S, S, 3) uint8 RGB.
    """

    model: nn.Module
    classes: tuple[str, ...]
    view: View
    augment: Augment
    device: torch.device
    state: dict[str, Any]

    def predict(self, images: Sequence[str | Path], top_k: int = 1) -> list[Prediction]:
        """The `top_k` most probable classes of image files, in their order. Unreadable ones have an `error`."""
        return self.predict_from(FileReader([Path(image) for image in images]), top_k)

    def predict_from(self, reader: Reader, top_k: int = 1, threads: int = 2) -> list[Prediction]:
        """The same for whatever a Reader reads, in the order of its ids."""
        found: list[Prediction] = []
        for ids, logits_NK, errors in self.logits(reader, evaluation_tiles(len(reader), BATCH), threads):
            found += self.name_rows(reader, ids, logits_NK, errors, top_k)
        return found

    def name_rows(
        self, reader: Reader, ids: Ids, logits_NK: torch.Tensor, errors: Sequence[str], top_k: int
    ) -> list[Prediction]:
        """One Prediction for each row of logits."""
        best = logits_NK.float().softmax(1).topk(min(top_k, len(self.classes)), dim=1)
        rows = zip(reader.keys(ids), best.indices.tolist(), best.values.tolist(), errors, strict=True)
        return [
            Prediction(name, (), (), error)
            if error
            else Prediction(name, tuple(self.classes[k] for k in numbers), tuple(shares))
            for (_, name), numbers, shares, error in rows
        ]

    @torch.inference_mode()
    def logits(
        self, reader: Reader, tiles: Sequence[tuple[int, int]], threads: int = 2, views: TestTimeViews = "none"
    ) -> Iterator[tuple[Ids, torch.Tensor, list[str]]]:
        """(ids, (n, K) logits, why each could not be read or "") of each (start, stop) tile of a reader's ids.

        The logits are the mean over the `views` of an image, see tta.py.
        """
        loader = Loader(reader, self.view, 0, threads, PREFETCH, device=self.device)
        requests = ([TileRequest(0, number, 0, np.arange(*span))] for number, span in enumerate(tiles))
        try:
            for (tile,) in loader.steps(requests):
                x_NCHW, _ = self.augment(tile, self.device, train=False)
                logits_NK = averaged(self.model, x_NCHW, views)
                reasons = {(bad.shard, bad.key): bad.reason for bad in loader.stats.bad}
                loader.stats.bad.clear()
                names = reader.keys(tile.request.ids) if reasons else []
                yield tile.request.ids, logits_NK, [reasons.get(name, "") for name in names] or [""] * len(logits_NK)
        finally:
            loader.close()


def load_model(path: str | Path, ema: bool = True, device: str = "cpu") -> Classifier:
    """The Classifier of a checkpoint or run folder; its averaged weights where there are any and `ema` is not False.

    Raises UserError for a folder that is no checkpoint or does not match its checksums.
    """
    saved = checkpoint.load(find_checkpoint(Path(path)))
    state, facts = saved.state, saved.state["preprocessing"]
    config = from_flat(state["config"], f"{saved.path}/state.json")
    model = build_plain(config.model, len(state["classes"]), facts["size"])
    model.load_state_dict(saved.ema if ema and saved.ema is not None else saved.model)
    where = torch.device(device)
    model = model.to(where).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return Classifier(
        model=model,
        classes=tuple(state["classes"]),
        view=View(facts["size"], facts["view"]),
        augment=Augment(tuple(facts["mean"]), tuple(facts["std"]), seed=0),
        device=where,
        state=state,
    )
