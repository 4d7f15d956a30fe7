"""Rows 3, 4, 5, 11 and 12: asked to stop in every way, and going on from there at any number of processes."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from distcnn.checkpoint import newest_whole, step_of
from distcnn.errors import EXIT_PREEMPTED
from distcnn.runfolder import read_rows
from tests.faults.ranks import Ranks, at_step, finish
from tests.faults.runs import STEPS, assert_same, assert_tidy, flags, results, state

SLOW = {-1: [("slow_steps", {"seconds": 0.05})]}
SLOWER = {-1: [("slow_steps", {"seconds": 0.5})]}  # so that no stop is late for a run of 24 steps, on a busy machine
SLOWEST = {-1: [("slow_steps", {"seconds": 0.8})]}  # the stop file is looked for once a second


def saved_step(run: Path) -> int:
    found, complaints = newest_whole(run)
    assert found is not None and not complaints
    return step_of(found)


def test_stopped_in_every_way_and_resumed_at_every_size(images: Path, tmp_path: Path, reference: Path) -> None:
    """A signal to one rank only, or the stop file: all ranks stop after the same step, saved once, with 75.

    Then the run goes on in the middle of the epoch with more or fewer processes; in the end it is the same run.
    """
    run = tmp_path / "run"
    words = flags(images, run)
    asked = [(2, signal.SIGTERM), (1, "stop"), (4, signal.SIGUSR1), (2, signal.SIGUSR2), (2, signal.SIGHUP)]
    middles = step = 0
    for number, (size, how) in enumerate(asked):
        with Ranks(tmp_path / f"stop-{number}", size, words, SLOWEST if how == "stop" else SLOWER) as ranks:
            ranks.until(at_step(run, step + 2))  # this start has made a step: its signal handlers stand
            if isinstance(how, signal.Signals):
                ranks.kill(size - 1, how)
            else:
                (run / how).touch()
            assert ranks.wait() == [EXIT_PREEMPTED] * size
        stopped = results(run)
        assert stopped["status"] == "stopped" and stopped["saved"] and stopped["step"] == saved_step(run)
        step = stopped["step"]
        position = state(run / "checkpoints" / "latest")["position"]
        middles += position["step"] % 6 > 0
        assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row] == list(
            range(1, stopped["step"] + 1)
        )
    assert middles >= 2, "most of the stops should come in the middle of an epoch"
    (run / "stop").touch()  # left over: a run that is started anew does not obey it
    assert finish(tmp_path / "end", 4, words) == [0] * 4
    assert_same(run, reference)


def test_the_time_limit_stops_the_run_and_a_requeued_one_goes_on(images: Path, tmp_path: Path, reference: Path) -> None:
    """Under W&B (offline) the parts are one W&B run."""
    run = tmp_path / "run"
    more = ["--wandb-mode", "offline", "--wandb-project", "p"]
    words = flags(images, run, *more)
    environment = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    with Ranks(tmp_path / "a", 2, [*words, "--time-limit", "0.05"], SLOW, environment) as ranks:
        assert ranks.wait() == [EXIT_PREEMPTED] * 2
    # Which process's clock is the first to say so is chance; rank 0 writes down what it knows.
    assert re.search("--time-limit|another process", results(run)["reason"]) and 0 < results(run)["step"] < STEPS
    first = state(run / "checkpoints" / "latest")["wandb_id"]
    assert finish(tmp_path / "b", 2, words, environment=environment) == [0, 0]
    assert state(run / "checkpoints" / "latest")["wandb_id"] == first != ""
    parts = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(parts) == 2 and all(name.endswith(first) for name in parts)
    assert_same(run, reference)


def test_signals_during_the_save_are_ignored(images: Path, tmp_path: Path) -> None:
    """Also the two SIGINTs that Ctrl-C under torchrun makes of one, and a third."""
    run, marker = tmp_path / "run", tmp_path / "saving"
    faults = {0: [("slow_steps", {"seconds": 0.05}), ("slow_saves", {"seconds": 0.7, "marker": str(marker)})]}
    with Ranks(tmp_path / "a", 2, flags(images, run), faults) as ranks:
        ranks.until(at_step(run, 2))
        for _ in range(2):
            ranks.kill(0, signal.SIGINT)
        ranks.until(marker.exists)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            ranks.kill(0, number)
            time.sleep(0.1)
        ranks.until(lambda: time.sleep(2.2) or True)  # longer than a second SIGINT is taken for the first
        ranks.kill(0, signal.SIGINT)
        assert ranks.wait() == [EXIT_PREEMPTED] * 2
    assert results(run)["reason"] == "SIGINT" and results(run)["step"] == saved_step(run)
    assert_tidy(run)


def test_a_save_that_never_ends_ends_at_the_deadline(images: Path, tmp_path: Path) -> None:
    """Here 2 s after the SIGTERM instead of 28. A rank that waits in a collective operation ends then, too."""
    run = tmp_path / "run"
    slow = [("slow_steps", {"seconds": 0.05}), ("grace", {"seconds": 2.0})]
    faults = {0: [*slow, ("slow_saves", {"seconds": 1000.0})], 1: slow}
    with Ranks(tmp_path / "a", 2, flags(images, run), faults) as ranks:
        ranks.until(at_step(run, 2))
        started = time.monotonic()
        for rank in (0, 1):
            ranks.kill(rank, signal.SIGTERM)
        assert ranks.wait() == [EXIT_PREEMPTED] * 2
        assert 1.9 < time.monotonic() - started < 20
    assert newest_whole(run) == (None, [])
    assert finish(tmp_path / "b", 2, flags(images, run, "--epochs", "1", "--resume", "never")) == [0, 0]
    assert_tidy(run)


def test_a_second_interrupt_ends_a_run_that_does_not_get_to_its_next_step(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Ranks(tmp_path / "a", 1, flags(images, run), {0: [("hang_in_data", {"step": 1})]}) as ranks:
        ranks.until(at_step(run, 1))
        ranks.kill(0, signal.SIGINT)
        time.sleep(2.2)
        ranks.kill(0, signal.SIGINT)
        assert ranks.wait() == [128 + signal.SIGINT]
