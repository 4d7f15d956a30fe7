"""Fast networks, optimizers and schedules: the same run from any number of processes, and resumed in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from distcnn import checkpoint
from distcnn.build import make_augment, make_loader, make_loss, open_dataset
from distcnn.config import TestTimeViews, from_flat
from distcnn.data.loader import TileRequest
from distcnn.distributed import Runtime
from distcnn.errors import UserError
from distcnn.evaluate import evaluate
from distcnn.job import Job
from distcnn.models import build_model
from distcnn.runfolder import METRICS, read_rows
from distcnn.train import train
from distcnn.tta import averaged
from distcnn.verify import reference
from distcnn.world import World
from tests.harness import Trace, simulate, small_config, trace_of
from tests.test_train import Crash, crash_at

SHARED: dict[str, Any] = {"checkpoint_every": 1, "crop": "random-resized", "log_every": 2}
MODELS: dict[str, dict[str, Any]] = {
    "resnet9": {
        **{"model": "resnet9", "channels": [4, 4, 6, 8], "optimizer": "muon", "schedule": "one-cycle", "lr": 0.01},
        **{"image_size": 12, "progressive": [6, 12], "tta": "flip", "balance": "inverse", "blur_pool": True},
        **{"lookahead": 4},
    },
    "airbench": {
        **{"model": "airbench", "channels": [4, 6, 6], "image_size": 16, "optimizer": "lamb", "schedule": "step"},
        **{"loss": "bce", "layer_decay": 0.7, "balance": "sqrt", "lookahead": 3},
        **{"tta": "flip-shift"},
    },
}


@pytest.fixture(scope="module")
def alone(stripes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trace]:
    """The trace of a run of one process, by the real Runtime."""
    traces: dict[str, Trace] = {}

    def run(model: str) -> Trace:
        if model not in traces:
            output = tmp_path_factory.mktemp("alone") / model
            train(small_config(stripes_set, output, **SHARED, **MODELS[model]), World())
            traces[model] = trace_of(output)
        return traces[model]

    return run


@pytest.mark.parametrize(("model", "ranks"), [("resnet9", 1), ("resnet9", 4), ("airbench", 2), ("airbench", 8)])
def test_the_same_run_from_any_number_of_ranks(
    alone: Callable[[str], Trace], model: str, ranks: int, stripes_set: Path, tmp_path: Path
) -> None:
    simulate(small_config(stripes_set, tmp_path / "run", **SHARED, **MODELS[model]), ranks)
    found = trace_of(tmp_path / "run")
    assert found == alone(model) and len(found.weights) == 6
    assert all(row["exactly_once"] for row in found.ledger)


@pytest.mark.parametrize(
    ("model", "step", "ranks", "ranks_after"),
    [("resnet9", 2, 1, 4), ("resnet9", 5, 2, 1), ("airbench", 3, 4, 1), ("airbench", 6, 1, 2)],
)
def test_a_run_that_died_in_the_middle_of_an_epoch_ends_as_if_it_had_not(
    alone: Callable[[str], Trace],
    model: str,
    step: int,
    ranks: int,
    ranks_after: int,
    stripes_set: Path,
    tmp_path: Path,
) -> None:
    config = small_config(stripes_set, tmp_path / "run", **SHARED, **MODELS[model])
    with pytest.raises(Crash):
        simulate(config, ranks, crash_at(step))
    simulate(config, ranks_after)
    assert trace_of(tmp_path / "run") == alone(model)


@pytest.mark.parametrize("model", ["resnet9", "airbench"])
def test_a_step_that_is_not_finite_is_left_out(model: str, stripes_set: Path, tmp_path: Path) -> None:
    def poison(job: Job) -> None:
        augment = job.augment

        def augments(tile: Any, device: Any, train: bool) -> Any:
            x_NCHW, targets = augment(tile, device, train)
            poisoned = train and (tile.request.epoch, tile.request.step) == (0, 1)
            return (x_NCHW * float("nan") if poisoned else x_NCHW), targets

        job.augment = augments  # type: ignore[assignment]

    simulate(small_config(stripes_set, tmp_path / "run", **SHARED, **MODELS[model]), 2, poison)
    states = [checkpoint.load(tmp_path / "run" / "checkpoints" / f"step_{step:08d}").model for step in (1, 2, 3)]
    parameters = [name for name in states[0] if not name.endswith("num_batches_tracked")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in parameters)
    assert not all(torch.equal(states[1][name], states[2][name]) for name in parameters)
    assert all(value.isfinite().all() for value in states[2].values())


def test_the_size_of_images_follows_the_epoch(stripes_set: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(job: Job) -> None:
        augment = job.augment

        def noting(tile: Any, device: Any, train: bool) -> Any:
            if train:
                seen.append((tile.request.epoch, tile.images.shape[1]))
            return augment(tile, device, train)

        job.augment = noting  # type: ignore[assignment]

    values = {**MODELS["resnet9"], "progressive": [6, 9, 12], "epochs": 3}
    simulate(small_config(stripes_set, tmp_path / "run", crop="random-resized", **values), 2, watch)
    assert sorted(set(seen)) == [(0, 6), (1, 9), (2, 12)]


def test_patience_ends_a_run_for_good(stripes_set: Path, tmp_path: Path) -> None:
    """A rate of almost 0 finds nothing better than the first epoch; started again, the run knows that it is over."""
    config = small_config(stripes_set, tmp_path / "run", epochs=9, lr=1e-12, patience=2, ema_decay=0.0)
    results = simulate(config, 2)
    rows = [row for row in read_rows(tmp_path / "run" / METRICS) if "val/top1" in row]
    assert len(rows) == results["epochs"] == 3 and results["steps"] == 9 and results["status"] == "complete"
    assert simulate(config, 1)["steps"] == 9
    assert len([row for row in read_rows(tmp_path / "run" / METRICS) if "val/top1" in row]) == 3


def test_patience_counts_evaluations(stripes_set: Path, tmp_path: Path) -> None:
    config = small_config(stripes_set, tmp_path / "run", epochs=9, lr=1e-12, patience=1, eval_every=3, ema_decay=0.0)
    assert simulate(config, 1)["steps"] == 18


def seen_in(image_CHW: np.ndarray, views: str) -> list[tuple[float, np.ndarray]]:
    """The views of an image and their shares, by slicing alone; images of 8 px are shifted by one."""
    wide = np.pad(image_CHW, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    shifts = {"none": [(1.0, 1)], "flip": [(1.0, 1)], "flip-shift": [(0.5, 1), (0.25, 0), (0.25, 2)]}[views]
    crops = [(share, wide[:, by : by + 8, by : by + 8]) for share, by in shifts]
    if views == "none":
        return crops
    return [(share / 2, crop) for share, crop in crops] + [(share / 2, crop[:, :, ::-1]) for share, crop in crops]


@pytest.mark.parametrize("views", get_args(TestTimeViews))
def test_views_are_averaged_in_the_evaluation(views: TestTimeViews, stripes_set: Path) -> None:
    config = from_flat({"data": str(stripes_set), "device": "cpu"})
    dataset = open_dataset(config, World())
    runtime = Runtime(config.run, World(), 1)
    model, augment = build_model(config.model, 5, 8, seed=0).eval(), make_augment(config, dataset)
    loader = make_loader(config, dataset, "val", train=False, threads=1, ahead=False)
    found = evaluate(runtime, model, loader, augment, 7, dataset.classes, views=views)
    loader.close()
    loader = make_loader(config, dataset, "val", train=False, threads=1, ahead=False)
    (tile,) = next(iter(loader.steps([[TileRequest(0, 0, 0, np.arange(len(loader.reader)))]])))
    x_NCHW, targets = augment(tile, torch.device("cpu"), train=False)
    seen = [seen_in(image_CHW, views) for image_CHW in x_NCHW.numpy()]
    shares = [share for share, _ in seen[0]]
    assert sum(shares) == 1 and len(shares) == {"none": 1, "flip": 2, "flip-shift": 6}[views]
    with torch.inference_mode():
        logits_NK = sum(
            share * model(torch.from_numpy(np.stack([image[number][1] for image in seen])))
            for number, share in enumerate(shares)
        )
    assert isinstance(logits_NK, torch.Tensor) and found is not None
    wanted = torch.nn.functional.cross_entropy(logits_NK, targets.labels).item()
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    plain = torch.nn.functional.cross_entropy(model(x_NCHW), targets.labels).item()
    assert (views == "none") == (found.loss == pytest.approx(plain, rel=1e-4))


@pytest.mark.parametrize("views", get_args(TestTimeViews))
@pytest.mark.parametrize("side", [8, 33, 64])
def test_the_reference_of_verify_takes_the_same_views(views: TestTimeViews, side: int) -> None:
    """It lays them out by other means; images of 64 px are shifted by two."""
    torch.manual_seed(side)
    x_NCHW = torch.randn(1, 3, side, side)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.GELU(), torch.nn.AdaptiveMaxPool2d(2))
    with torch.inference_mode():
        wanted = averaged(model, x_NCHW, views)
        seen = reference._views(x_NCHW, views)
        found = sum(share * model(view_NCHW) for share, view_NCHW in seen)
    assert isinstance(found, torch.Tensor) and sum(share for share, _ in seen) == 1
    assert torch.allclose(found, wanted, atol=1e-6)


def test_class_weights_come_from_the_training_split(stripes_set: Path) -> None:
    config = from_flat({"data": str(stripes_set), "balance": "inverse", "loss": "bce", "label_smoothing": 0.2})
    dataset = open_dataset(config, World())
    loss = make_loss(config, dataset, torch.device("cpu"))
    counts = np.array(dataset.manifest.split("train").class_counts)
    assert (loss.kind, loss.smoothing) == ("bce", 0.2) and loss.class_weights is not None
    assert np.allclose(loss.class_weights.numpy() * counts, counts.sum() / len(counts), rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"balance": "sqrt"}, "--balance needs --loader exact"),
        ({"progressive": [8]}, "--progressive needs --loader exact"),
        ({"model": "airbench", "channels": [4, 4, 4], "image_size": 16}, "--model airbench needs --loader exact"),
    ],
)
def test_what_a_stream_cannot_do(values: dict[str, Any], said: str, stripes_set: Path, tmp_path: Path) -> None:
    config = small_config(stripes_set, tmp_path / "run", **{"crop": "auto", "loader": "stream", **values})
    with pytest.raises(UserError, match=said):
        train(config, World())
