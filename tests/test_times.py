from __future__ import annotations

import json
from pathlib import Path

import pytest

from distcnn.data.loader import LoaderStats
from distcnn.heartbeat import COMPUTE, DATA, REDUCE, SAVE, Pulse
from distcnn.runfolder import METRICS, read_rows
from distcnn.times import LOADING, PARTS, Times, file_of, read_times
from tests.harness import simulate, small_config


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("distcnn.heartbeat.time.monotonic", lambda: now[0])
    return now


def test_parts_of_a_step(clock: list[float]) -> None:
    """A checkpoint is no part of a step; what `take_seconds` has given to others counts here, too."""
    pulse, stats = Pulse(), LoaderStats()
    times = Times(pulse, stats)
    for phase, seconds in ((DATA, 1.0), (COMPUTE, 4.0), (REDUCE, 3.0), (SAVE, 50.0), (DATA, 2.0)):
        pulse.mark(phase)
        clock[0] += seconds
    pulse.take_seconds()
    times.augment_seconds += 1.0
    stats.decode_seconds += 20.0
    assert times.shares() == {"perf/augment_share": 0.1, "perf/compute_share": 0.3, "perf/reduce_share": 0.3}
    row = times.row()
    assert [row[part] for part in PARTS] == [3.0, 1.0, 3.0, 3.0] and row["decode"] == 20.0
    clock[0] += 5.0
    row = times.row()
    assert row.pop("at") > 1e9
    assert row == dict.fromkeys((*PARTS, *LOADING), 0.0) | {"data": 5.0}, "since the last row"
    assert times.shares()["perf/compute_share"] == 0.0


def write(run: Path, rank: int, *rows: dict[str, float]) -> None:
    (run / "logs").mkdir(exist_ok=True)
    (run / file_of(rank)).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_the_last_number_of_processes_are_added_up(tmp_path: Path) -> None:
    assert read_times(tmp_path) == []
    two, four = {"at": 1.0, "size": 2, "compute": 70.0}, {"at": 2.0, "size": 4, "data": 1.0, "compute": 3.0}
    write(tmp_path, 0, two, four, four | {"at": 3.0})
    write(tmp_path, 1, two, four)
    write(tmp_path, 10, {"of": 9})  # by another program
    (tmp_path / "logs" / "times_x.jsonl").write_text("{}")
    (tmp_path / "logs" / "times_2.jsonl").write_text('{"at": 2.0, "si')  # cut by a kill
    first, second = read_times(tmp_path)
    assert (first.rank, first.whole, first.share("data")) == (0, 8.0, 0.25) and (second.rank, second.whole) == (1, 4.0)
    write(tmp_path, 0, {"at": 5.0, "size": 1})
    (alone,) = read_times(tmp_path)
    assert (alone.rank, alone.whole, alone.share("data")) == (0, 0.0, 0.0)


def test_every_rank_of_a_run_writes_a_row_an_epoch(stripes_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    simulate(small_config(stripes_set, run), 2)
    for rank in range(2):
        rows = read_rows(run / file_of(rank))
        assert [(row["epoch"], row["step"], row["size"]) for row in rows] == [(0, 3, 2), (1, 3, 2)]
        assert all(row[part] > 0 for row in rows for part in PARTS)
    for row in read_rows(run / METRICS):
        if "train/loss" in row:
            shares = [row[f"perf/{part}_share"] for part in PARTS if part != "data"]
            assert all(0 < share < 1 for share in shares) and sum(shares) <= 1
