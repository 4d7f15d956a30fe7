"""The rule of the range test on curves made by hand; both commands on small real sets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcnn.build import open_dataset
from distcnn.cli import main
from distcnn.config import TrainConfig, from_flat
from distcnn.errors import UserError
from distcnn.tune import tile as tiles
from distcnn.tune.rate import RangeTest, range_test, smooth
from distcnn.tune.tile import Measured, measure, suggest, tile_sizes
from distcnn.tune.trial import trial_job
from distcnn.world import World

RATES = np.geomspace(1e-5, 1.0, 51)  # ten steps a decade


def config_of(data: Path, **values: Any) -> TrainConfig:
    return from_flat({"data": str(data), "global_batch_size": 32, "tile_size": 4, "device": "cpu"} | values)


def valley(bottom: float, bump: float = 0.0) -> RangeTest:
    """Loss 2, falling from 1e-4 to 1 at `bottom`, flat for a decade, then up; `bump`: a dip within the flat part."""
    x = np.log10(RATES)
    start, low = -4.0, math.log10(bottom)
    curve = np.interp(x, [start, low, low + 1, low + 1.5], [2, 1, 1, 9])
    return RangeTest(RATES, curve - bump * (np.arange(51) == int((low + 5.3) * 10)), diverged=False)


@pytest.mark.parametrize("bump", [0.0, 0.1])
@pytest.mark.parametrize("bottom", [1e-3, 1e-2])
def test_the_edge_of_the_bottom_is_found_whatever_dips_there_are(bottom: float, bump: float) -> None:
    found = valley(bottom, bump)
    assert math.log10(found.edge) == pytest.approx(math.log10(bottom) + 1, abs=0.11)
    assert found.suggestion == pytest.approx(found.edge / 10, rel=0.05)
    assert 1e-4 < found.steepest < bottom
    if bump:
        assert found.lowest == pytest.approx(bottom * 2, rel=0.2)


@pytest.mark.parametrize(
    ("losses", "suggested"),
    [
        (np.full(51, 2.3), False),  # nothing happens
        (np.linspace(2.3, 2.25, 51), False),  # hardly anything
        (np.linspace(2.3, 9.0, 51), False),  # it only rises
        (np.linspace(2.3, 1.0, 51), True),  # it falls to the end: the last rate is the edge
    ],
)
def test_without_a_fall_nothing_is_suggested(losses: Any, suggested: bool) -> None:
    found = RangeTest(RATES, losses, diverged=False)
    assert (found.suggestion is not None) == suggested
    if suggested:
        assert found.edge == RATES[-1]


def test_smoothing_moves_nothing_along_the_axis() -> None:
    peak = np.zeros(81)
    peak[40] = 1.0
    curve = smooth(peak)
    assert curve.argmax() == 40 and np.allclose(curve, curve[::-1]) and curve.sum() == pytest.approx(1.0)
    assert np.allclose(smooth(np.full(30, 3.0)), 3.0), "at the ends, too"


def test_the_test_makes_the_trainers_own_steps_until_the_loss_breaks(stripes_set: Path) -> None:
    """More steps than an epoch has; rates as asked for; the same steps give the same losses."""
    config = config_of(stripes_set)
    runs = []
    for _ in range(2):
        with trial_job(config, open_dataset(config, World()), World()) as job:
            folder = job.run
            assert folder.is_dir() and job.ema is None and job.tracker is None
            runs.append(range_test(job, 40, 1e-5, 1e4))
        assert not folder.exists()
    first, second = runs
    assert np.array_equal(first.losses, second.losses)
    assert first.diverged and 3 < len(first.losses) < 40
    assert first.rates == pytest.approx(np.geomspace(1e-5, 1e4, 40)[: len(first.rates)])


def test_a_rate_of_zero_leaves_the_weights(stripes_set: Path) -> None:
    """What is timed for tile sizes trains nothing, weight decay included."""
    config = config_of(stripes_set, weight_decay=0.5)
    with trial_job(config, open_dataset(config, World()), World()) as job:
        before = [p.detach().clone() for p in job.model.parameters()]
        for _ in range(3):
            tiles._seconds(job, tiles._first_tiles(job))
        assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1]), (8, [1, 2, 4, 8]), (48, [1, 2, 4, 8, 16]), (7, [1]), (12, [1, 2, 4])]
)
def test_tile_sizes_are_powers_of_two_that_divide_the_batch(batch: int, sizes: list[int]) -> None:
    assert tile_sizes(batch) == sizes


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [([10, 50, 91, 100], 4), ([100, 95, 60], 1), ([10, 20, 0], 2), ([0], None), ([], None)],
)
def test_the_smallest_tile_that_is_fast_enough(speeds: list[float], chosen: int | None) -> None:
    rows = [Measured(1 << power, 1, speed, 0) for power, speed in enumerate(speeds)]
    found = suggest(rows)
    assert (found.tile if found else None) == chosen


def test_a_machine_that_does_something_else_is_noticed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from distcnn.commands.tune_tile import _advise

    for spread, said in ((0.1, False), (0.9, True)):
        rows = [Measured(1, 2, 10.0, 0, 0.0), Measured(2, 1, 20.0, 0, spread)]
        _advise(rows, rows[1], TrainConfig())
        assert ("took up to 90% longer" in capsys.readouterr().out) == said


def test_out_of_memory_is_a_row_and_no_end(stripes_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(stripes_set)
    dataset = open_dataset(config, World())
    good = measure(config, dataset, World(), 16, 0.05)
    assert (good.tile, good.lanes) == (16, 2) and good.images_per_second > 0 and good.memory_bytes > 1 << 20

    def full(*details: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiles, "train_step", full)
    assert measure(config, dataset, World(), 16, 0.05) == Measured(16, 2, 0.0, 0)


def test_both_commands_leave_a_picture_and_numbers_and_nothing_else(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(digits_set), "--device", "cpu", "--threads", "1", "--wandb-mode", "disabled"]
    assert main(["tune-lr", *flags, "--steps", "60"]) == 0
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "tune-lr.json").read_text())
    assert f"--lr {numbers['suggestion']:g}" in said and "where it diverged" in said
    assert 1e-4 < numbers["suggestion"] < 3e-2, "near the recipe's 3e-3"
    assert main(["tune-tile", *flags, "--seconds", "0.05", "--global-batch-size", "24"]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "tune-tile.json").read_text())["rows"]
    assert [(row["tile"], row["lanes"]) for row in rows] == [(1, 24), (2, 12), (4, 6), (8, 3)]
    assert "another tile size is another" in said and "--tile-size" in said
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tune-lr.png", "tune-lr.json", "tune-tile.png", "tune-tile.json"}
    for name in ("tune-lr.png", "tune-tile.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune-lr", "--steps", "5"], "--steps 5: at least 10"),
        (["tune-lr", "--lowest-lr", "1", "--highest-lr", "0.1"], "below --highest-lr"),
        (["tune-lr", "--plot", "x.jpg"], "is a .png"),
        (["tune-lr", "--plot", "no/x.png"], "there is no folder no"),
        (["tune-tile", "--seconds", "0"], "must be positive"),
        (["tune-tile", "--tile-size", "5"], "must be a multiple"),
    ],
)
def test_wrong_flags(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_other_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from distcnn.tune import trial

    monkeypatch.setattr(trial, "read_world", lambda: World(1, 2))
    with pytest.raises(UserError, match="start it as one process"):
        trial.one_process()
