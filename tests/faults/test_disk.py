"""Rows 9, 10 and 21: a disk that is full, lies or cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distcnn.checkpoint import newest_whole, step_of
from distcnn.errors import EXIT_USAGE
from distcnn.runfolder import read_rows
from tests.faults.disks import fill, mounted
from tests.faults.ranks import Ranks, at_step, finish
from tests.faults.runs import STEPS, assert_same, flags, results

FULL = "No space left on device"


def test_a_disk_that_fills_up_and_is_freed_again(images: Path, tmp_path: Path, reference: Path) -> None:
    """The old checkpoint stays, rows wait, heartbeats go on; then everything is written, and nothing is missing."""
    with mounted(tmp_path / "disk", "size=2m") as disk:
        run = disk / "run"
        slow = {-1: [("slow_steps", {"seconds": 0.1})]}
        with Ranks(tmp_path / "a", 2, flags(images, run, "--checkpoint-every", "2"), slow) as ranks:
            ranks.until(lambda: (run / "checkpoints" / "step_00000004").exists())
            ballast = fill(disk)
            rows_wait = "metrics.jsonl cannot be written"  # once its last block is full
            ranks.until(lambda: ranks.err().count("not written") >= 2 and rows_wait in ranks.err())
            written = len(read_rows(run / "metrics.jsonl"))
            found, complaints = newest_whole(run)
            assert found is not None and not complaints and not list(run.glob("checkpoints/.tmp-*/*"))
            ballast.unlink()
            assert ranks.wait() == [0, 0]
            warnings = ranks.err().splitlines()
        saves = [line for line in warnings if "checkpoint at step" in line]
        assert all(f"not written ({FULL}); the last one stays, the next save tries again" in line for line in saves)
        assert sum(rows_wait in line for line in warnings) == 1
        assert written < STEPS, "the disk must have been full before the end, or this proves nothing"
        assert_same(run, reference)


def test_a_disk_that_stays_full_ends_with_one_line_and_the_run_goes_on_when_there_is_space(
    images: Path, tmp_path: Path, reference: Path
) -> None:
    with mounted(tmp_path / "disk", "size=2m") as disk:
        run = disk / "run"
        words = flags(images, run)
        slow = {-1: [("slow_steps", {"seconds": 0.05})]}
        with Ranks(tmp_path / "a", 1, words, slow) as ranks:
            ranks.until(lambda: (run / "checkpoints" / "step_00000006").exists())
            ballast = fill(disk)
            assert ranks.wait() == [EXIT_USAGE]
            last = ranks.err().splitlines()[-1]
        assert f"the last checkpoint of {run} cannot be written ({FULL}): make space, then give the same" in last
        with Ranks(tmp_path / "b", 1, words) as ranks:  # no better: it does not begin to train for nothing
            assert ranks.wait() == [EXIT_USAGE] and len(ranks.err().splitlines()) == 1
            assert FULL in ranks.err()
        ballast.unlink()
        assert finish(tmp_path / "c", 1, words) == [0]
        assert_same(run, reference)


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(
    images: Path, tmp_path: Path, reference: Path
) -> None:
    """Then a file cut off in that one, too."""
    run = tmp_path / "run"
    words = flags(images, run, "--keep-checkpoints", "9")
    with Ranks(tmp_path / "a", 1, words, {0: [("slow_steps", {"seconds": 0.03})]}) as ranks:
        ranks.until(at_step(run, 20))
        ranks.kill(0, 2)
        ranks.wait()
    newest, _ = newest_whole(run)
    assert newest is not None
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    os.truncate(run / "checkpoints" / "step_00000018" / "trainer.pt", 100)
    with Ranks(tmp_path / "b", 2, words) as ranks:
        assert ranks.wait() == [0, 0]
        first, second = ranks.err().splitlines()
    bad = newest / "model.safetensors"
    assert first == f"warning: {bad} does not match its checksum: going back to the checkpoint before"
    assert "step_00000018/trainer.pt is missing or truncated: going back" in second
    found, complaints = newest_whole(run)
    assert found is not None and step_of(found) == STEPS and not complaints
    assert_same(run, reference)


@pytest.mark.parametrize("inside", [False, True])
def test_a_read_only_output_is_one_line(images: Path, tmp_path: Path, inside: bool) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        run = disk / "a" / "run" if inside else disk
        with Ranks(tmp_path / "a", 2, flags(images, run)) as ranks:
            assert ranks.wait() == [EXIT_USAGE] * 2
            assert len(ranks.err(0).splitlines()) == 1 and ranks.err(1) == ""
            assert f"distcnn train: error: --output {run} cannot be written: " in ranks.err(0)


def test_no_space_in_shared_memory_does_not_matter(images: Path, tmp_path: Path) -> None:
    """The loader's threads need none, and gloo talks over TCP. (NCCL does need it: `distcnn doctor` looks.)"""
    run = tmp_path / "run"
    small = {-1: [("tiny_shared_memory", {})]}
    with mounted(tmp_path / "probe", "size=4k"):
        pass
    assert finish(tmp_path / "a", 2, flags(images, run, "--epochs", "1"), faults=small) == [0, 0]
    assert results(run)["status"] == "complete"
