from __future__ import annotations

import math

import pytest
import torch

from distcnn.data.loader import PARTS, LoaderStats
from distcnn.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("distcnn.meter.time.perf_counter", lambda: now[0])
    return now


def test_a_row_is_a_mean_over_its_steps_and_its_training_time(clock: list[float]) -> None:
    stats = LoaderStats()
    meter, losses = Meter(stats), [0.0, 0.0]
    for loss in (1.0, 2.0, 6.0):
        meter.add(torch.tensor(loss, dtype=torch.float64), 32)
        clock[0] += 2
        stats.wait_seconds += 0.5
        stats.decode_seconds += 3.0  # of two threads
    row = meter.row(losses)
    shares = {f"perf/{part}_share": 0.0 for part in PARTS} | {"perf/wait_share": 0.25, "perf/decode_share": 1.5}
    assert row == {"train/loss": 3.0, "perf/images_per_second": 96 / 6, **shares} and losses == [0, 0]
    meter.add(torch.tensor(5.0), 10)
    clock[0] += 1
    assert meter.row(losses)["train/loss"] == 5 and meter.total_samples == 106


def test_what_is_not_training_does_not_count(clock: list[float]) -> None:
    meter, losses = Meter(LoaderStats()), [0.0, 0.0]
    meter.add(torch.tensor(1.0), 30)
    clock[0] += 3
    meter.stop()
    clock[0] += 1000  # an evaluation
    meter.start()
    meter.add(torch.tensor(1.0), 30)
    clock[0] += 3
    assert meter.row(losses)["perf/images_per_second"] == 10
    meter.stop()
    assert meter.total_seconds == 6


def test_losses_survive_a_checkpoint_between_two_rows() -> None:
    """Settled and saved, read back into another meter: the same mean."""
    straight, broken, resumed = (Meter(LoaderStats()) for _ in range(3))
    values = [torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64), torch.tensor(1e-9)]
    all_losses, losses = [0.0, 0.0], [0.0, 0.0]
    for value in values:
        straight.add(value, 1)
    for value in values[:2]:
        broken.add(value, 1)
    broken.settle(losses)
    assert losses[1] == 2
    resumed.add(values[2], 1)
    assert resumed.row(losses)["train/loss"] == straight.row(all_losses)["train/loss"]


def test_steps_that_were_left_out_do_not_spoil_the_mean() -> None:
    meter, losses = Meter(LoaderStats()), [0.0, 0.0]
    for loss in (1.0, math.nan, math.inf, 3.0):
        meter.add(torch.tensor(loss), 8)
    assert meter.row(losses)["train/loss"] == 2
    assert math.isnan(meter.row(losses)["train/loss"]), "no step, no mean"
