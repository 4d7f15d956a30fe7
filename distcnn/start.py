"""What a new run begins with besides its seed: pretrained weights, a first layer that whitens the set's own images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from distcnn.build import Dataset, make_loader
from distcnn.config import TrainConfig
from distcnn.console import Console
from distcnn.distributed import Runtime
from distcnn.errors import UserError
from distcnn.fastnets import Airbench
from distcnn.pretrained import begin_with, read_weights
from distcnn.whitening import whitening_weight


def set_first_weights(
    config: TrainConfig, dataset: Dataset, model: nn.Module, runtime: Runtime, console: Console, threads: int
) -> None:
    """Change a model that was initialised by the seed into the one that the run begins with. All ranks call it.

    Raises UserError for weights that cannot be read or do not fit.
    """
    if config.model.pretrained:
        found = begin_with(model, read_weights(Path(config.model.pretrained)), config.model.pretrained)
        console.say(f"--pretrained {config.model.pretrained}: {found}")
    elif isinstance(model, Airbench):
        if config.data.loader != "exact":
            raise UserError("--model airbench needs --loader exact: it looks at training images before it begins")
        _whiten(config, dataset, model, runtime, threads)


@torch.no_grad()
def _whiten(config: TrainConfig, dataset: Dataset, model: Airbench, runtime: Runtime, threads: int) -> None:
    """Rank 0 computes the filters; all get the same numbers."""
    values = []
    if runtime.world.is_main:
        loader = make_loader(config, dataset, config.data.train_split, False, threads, False)
        try:
            values = whitening_weight(loader, model.whiten, dataset.mean, dataset.std).flatten().tolist()
        finally:
            loader.close()
    weight = torch.tensor(runtime.broadcast(values), dtype=torch.float32)
    model.whiten.weight.copy_(weight.view(model.whiten.weight.shape))
