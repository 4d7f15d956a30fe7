"""Row 19: NaN on one rank. All ranks leave the step out, a black box tells why; after too many in a row they stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distcnn.blackbox import MAX_BOXES
from distcnn.checkpoint import newest_whole
from distcnn.cli import main
from distcnn.errors import EXIT_USAGE
from distcnn.limits import MAX_BAD_STEPS
from distcnn.runfolder import read_rows
from tests.faults.ranks import Ranks, finish
from tests.faults.runs import STEPS, flags, weights

NAN_AT = [3, 11]  # of 24 steps; the second is the last but one of its epoch


@pytest.fixture(scope="module")
def poisoned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks; rank 1's third tile, lane 6, is NaN at two steps."""
    folder = tmp_path_factory.mktemp("poisoned")
    fault = {1: [("not_finite", {"steps": NAN_AT, "tile": 2})]}
    with Ranks(folder, 2, flags(images, folder / "run"), fault) as ranks:
        assert ranks.wait() == [0, 0]
        lines = ranks.err(0).splitlines()
    assert [f"step {step} was left out" in line for step, line in zip(NAN_AT, lines, strict=True)] == [True, True]
    return folder / "run"


def strictly(text: str) -> Any:
    """JSON as its standard has it, without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_all_ranks_leave_the_same_step_out(images: Path, tmp_path: Path, poisoned: Path, reference: Path) -> None:
    """As one process does that has the same fault: so the other rank did nothing else. Rows hold no NaN."""
    alone = tmp_path / "run"
    assert finish(tmp_path, 1, flags(images, alone), faults={0: [("not_finite", {"steps": NAN_AT, "tile": 6})]}) == [0]
    assert weights(alone) == weights(poisoned) != weights(reference)
    rows = [strictly(line) for line in (poisoned / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/lr" in row]
    assert [row["train/left_out"] for row in rows] == [0] * 3 + [1] * 8 + [2] * 13 and len(rows) == STEPS
    assert [row["step"] for row in rows if "train/loss" not in row] == [step + 1 for step in NAN_AT]
    assert all(row["exactly_once"] for row in read_rows(poisoned / "ledger.jsonl"))


def test_a_black_box_of_a_fault_of_one_process_says_so(
    images: Path, poisoned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = sorted(path.name for path in (poisoned / "blackbox").iterdir())
    assert boxes == [f"step_{step:08d}" for step in NAN_AT]
    box = poisoned / "blackbox" / boxes[0]
    assert sorted(path.name for path in box.iterdir()) == [
        "box.json", "config.toml", "model.safetensors", "rank_0.json", "rank_1.json",
    ]  # fmt: skip
    tiles = [tile for rank in (0, 1) for tile in strictly((box / f"rank_{rank}.json").read_text())["tiles"]]
    assert [tile["lane"] for tile in tiles] == list(range(8))
    assert [tile["lane"] for tile in tiles if tile["loss"] == "nan"] == [6]
    assert all(isinstance(tile["loss_again"], float) and tile["origin"] == "" for tile in tiles)
    assert all(set(sample) == {"id", "shard", "key", "label"} for tile in tiles for sample in tile["samples"])
    assert main(["replay", str(box)]) == 0
    said = capsys.readouterr().out
    assert "not reproduced: the loss was not finite in lane 6 of rank 1, and is here" in " ".join(said.split())
    for tile in tiles:
        assert tile["lane"] == 6 or f"{tile['loss']:.4g}"[:5] in said, "the other losses are those of the training"


def test_divergence_is_reproduced_and_ends_the_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = flags(images, run, "--lr", "1e30", "--warmup-epochs", "0", "--checkpoint-every", "1", "--epochs", "4")
    with Ranks(tmp_path / "a", 2, words) as ranks:
        assert ranks.wait() == [EXIT_USAGE] * 2
        *warnings, last = ranks.err(0).splitlines()
    assert f"not finite in {MAX_BAD_STEPS} steps in a row" in last and "lower --lr" in last
    boxes = sorted((run / "blackbox").iterdir())
    assert len(boxes) == MAX_BOXES, "bounded"
    assert "first in features.1.0 (Conv2d): its output is not finite" in warnings[0]
    assert main(["replay", str(boxes[0])]) == 0
    assert "reproduced: not finite here either, first in features.1.0" in " ".join(capsys.readouterr().out.split())


def test_weights_that_are_not_finite_are_never_saved(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = flags(images, run, "--lr", "1e39", "--warmup-epochs", "0", "--checkpoint-every", "1")
    with Ranks(tmp_path / "a", 2, words) as ranks:
        assert ranks.wait() == [EXIT_USAGE] * 2
        (line,) = ranks.err(0).splitlines()
    assert "weights are not finite after step 1, and so are not saved: lower --lr" in line
    assert newest_whole(run) == (None, [])
