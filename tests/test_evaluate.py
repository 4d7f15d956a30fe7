# N samples, K classes
from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distcnn.build import make_augment, make_loader, open_dataset
from distcnn.data.loader import Loader, TileRequest
from distcnn.errors import DataError
from distcnn.evaluate import evaluate
from distcnn.metrics import Evaluation
from distcnn.models import build_model
from distcnn.world import World
from tests.harness import Meeting, SimulatedRuntime, small_config

CLASSES = tuple("abcde")


def evaluation(root: Path, ranks: int, tile: int) -> list[Evaluation]:
    """The evaluation of an untrained model as every rank sees it."""
    config = small_config(root, Path("unused"))
    dataset = open_dataset(config, World())
    meeting = Meeting(ranks)

    def work(rank: int) -> Evaluation:
        loader: Loader = make_loader(config, dataset, "val", train=False, threads=1, ahead=False)
        runtime = SimulatedRuntime(World(rank, ranks, rank, ranks), meeting, config.run)
        model = build_model(config.model, 5, 8, seed=0)
        model.train()
        model.features.eval()  # modes are given back as they were, module by module or as a whole
        found = evaluate(runtime, model, loader, make_augment(config, dataset), tile, CLASSES)
        assert model.training and found is not None
        return found

    results: list[Evaluation] = meeting.run(work)
    return results


def test_every_rank_has_the_same_numbers_at_any_number_of_ranks(stripes_set: Path) -> None:
    (alone,) = evaluation(stripes_set, 1, tile=4)
    assert alone.samples == 37 and alone.rows[:, 0].tolist() == list(range(37))
    for ranks in (2, 3, 8, 11):  # 37 samples in tiles of 4 are 10 tiles: with 11 ranks one has nothing to do
        for found in evaluation(stripes_set, ranks, tile=4):
            assert np.array_equal(found.rows, alone.rows), f"{ranks} ranks"


def test_it_is_what_a_plain_loop_over_the_split_finds(stripes_set: Path) -> None:
    config = small_config(stripes_set, Path("unused"))
    dataset = open_dataset(config, World())
    loader = make_loader(config, dataset, "val", train=False, threads=1, ahead=False)
    (batch,) = next(loader.steps([[TileRequest(0, 0, 0, np.arange(37))]]))
    x_NCHW = torch.stack(
        [(image.float() / 255 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std) for image in batch.images]
    ).permute(0, 3, 1, 2)
    model = build_model(config.model, 5, 8, seed=0).eval()
    with torch.no_grad():
        logits_NK = model(x_NCHW)
    (found,) = evaluation(stripes_set, 1, tile=37)
    assert found.rows[:, 2].tolist() == logits_NK.argmax(1).tolist()
    assert found.rows[:, 1].tolist() == batch.labels.tolist()
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits_NK, batch.labels).item(), rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_sample_that_cannot_be_read_is_said_by_all_ranks(stripes_set: Path, tmp_path: Path, ranks: int) -> None:
    """A score over fewer samples would be another score."""
    root = tmp_path / "damaged"
    shutil.copytree(stripes_set, root)
    (shard,) = root.glob("val-*.tar")
    with tarfile.open(shard) as tar:
        place = next(member.offset_data for member in tar if member.name.endswith(".png"))
    with shard.open("r+b") as file:
        file.seek(place)
        file.write(b"no image at all")
    with pytest.raises(DataError, match="1 samples of the evaluation split cannot be read"):
        evaluation(root, ranks, tile=4)


def test_given_up_by_one_rank_it_is_given_up_by_all(stripes_set: Path) -> None:
    config = small_config(stripes_set, Path("unused"))
    dataset = open_dataset(config, World())
    meeting = Meeting(2)

    def work(rank: int) -> Evaluation | None:
        loader = make_loader(config, dataset, "val", train=False, threads=1, ahead=False)
        runtime = SimulatedRuntime(World(rank, 2, rank, 2), meeting, config.run)
        model, augment = build_model(config.model, 5, 8, seed=0), make_augment(config, dataset)
        return evaluate(runtime, model, loader, augment, 4, CLASSES, give_up=lambda: rank == 1)

    assert meeting.run(work) == [None, None]
