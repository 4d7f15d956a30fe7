"""Pictures of a report: samples that the network gets wrong or is unsure of, and a batch as training sees it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from PIL import Image

from distcnn.augment import Targets
from distcnn.build import make_augment, make_balance, make_loader, make_order
from distcnn.data.loader import training_requests
from distcnn.pictures import tile
from distcnn.report.gather import RunFacts, validation_reader
from distcnn.samples import read_pictures

SIDE = 112  # pixels of a picture
BATCH_PICTURES = 24


@dataclass(frozen=True)
class Picture:
    """An image and its class; of a mixed one, both classes and the share of the first."""

    image: Image.Image
    label: int
    partner: int
    share: float


def case_pictures(run: RunFacts) -> dict[int, Image.Image]:
    """Thumbnails by id of the cases of a run's last evaluation; {} where its data set cannot be seen from here."""
    reader = validation_reader(run)
    if reader is None or run.last is None:
        return {}
    try:
        found = read_pictures(reader, (case.id for case in (*run.last.wrong, *run.last.unsure)))
    finally:
        reader.close()
    return {number: tile(Image.fromarray(pixels), SIDE) for number, pixels in found.items()}


def training_batch(run: RunFacts) -> list[Picture]:
    """The first samples of the run's first step, augmented and mixed as in training; [] for remote data or a stream."""
    dataset, config = run.dataset, run.config
    if dataset is None or config.data.loader != "exact":
        return []
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache="off"))
    loader = make_loader(config, dataset, config.data.train_split, True, 2, False)
    try:
        if getattr(loader.reader, "remote", False):
            return []
        order = make_order(config, loader.reader.counts, 0, make_balance(config, dataset, loader.reader))
        lanes = range(min(config.geometry.lanes, -(-BATCH_PICTURES // config.geometry.tile)))
        augment, pictures = make_augment(config, dataset), []
        for part in next(loader.steps(training_requests(order, lanes))):
            x_NCHW, targets = augment(part, torch.device("cpu"), train=True)
            pictures += _pictures(x_NCHW, targets, dataset.mean, dataset.std)
    finally:
        loader.close()
    return pictures[:BATCH_PICTURES]


def _pictures(x_NCHW: torch.Tensor, targets: Targets, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Picture]:
    """Model inputs as pictures: the normalisation undone."""
    columns = torch.tensor([std, mean])[:, :, None, None]  # (2, 3, 1, 1)
    pixels = ((x_NCHW * columns[0] + columns[1]) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    rows = zip(pixels.numpy(), targets.labels.tolist(), targets.partner_labels.tolist(), strict=True)
    return [
        Picture(tile(Image.fromarray(image), SIDE), label, partner, targets.share) for image, label, partner in rows
    ]
