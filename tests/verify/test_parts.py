"""The parts of a verification: what is run on what, how a wrong sum is explained, what the reports say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distcnn.config import TrainConfig, from_flat
from distcnn.data.manifest import load_manifest
from distcnn.data.order import EpochOrder, Geometry
from distcnn.data.shards import SplitReader
from distcnn.errors import UserError
from distcnn.verify import blame
from distcnn.verify.evidence import Evidence
from distcnn.verify.plan import CHECKS, EPOCHS, choose_processes, exact, plan_runs, short_config
from distcnn.verify.reference import clipped, learning_rate, relative
from distcnn.verify.report import Report, render, write_report
from distcnn.verify.result import Result, few, plural
from distcnn.verify.subset import SHARDS, make_subset, ragged_samples, spread
from distcnn.verify.sum_checks import _undisturbed
from distcnn.verify.verify import CHECK_FUNCTIONS


@pytest.mark.parametrize(
    ("every", "kept"), [(0, [0, 3]), (2, [0]), (3, [0, 3]), (4, [0]), (5, [0, 3]), (8, [0, 3]), (100, [0, 3])]
)
def test_where_lookahead_averages_statistics_they_are_not_compared(every: int, kept: list[int]) -> None:
    """Four steps an epoch, eight in all: the first and the fourth are looked at."""
    config = from_flat({"lookahead": every, "epochs": 2})
    evidence = Evidence(config, None, config, None, 4, {})  # type: ignore[arg-type]
    assert _undisturbed(evidence, [0, 3]) == kept


@pytest.mark.parametrize(
    ("available", "batch", "tile", "steps", "wanted"),
    [
        (1438, 64, 8, 4, 3 * 64 + 36),
        (1438, 64, 8, 1, 36),
        (100, 64, 8, 4, 100),
        (128, 64, 8, 4, 127),  # no full last step
        (64, 64, 8, 4, 63),
        (5, 64, 8, 4, 5),
        (1, 64, 8, 4, 1),
        (100, 8, 1, 3, 16 + 7),  # one lane has nothing in the last step
        (100, 2, 1, 3, 5),
        (100, 1, 1, 3, 3),  # a batch of one is never ragged
        (3, 1, 1, 9, 3),
    ],
)
def test_ragged_samples(available: int, batch: int, tile: int, steps: int, wanted: int) -> None:
    geometry = Geometry(batch, tile)
    samples = ragged_samples(available, geometry, steps)
    assert samples == wanted
    order = EpochOrder(np.array([samples]), geometry, 0, 0)
    assert order.steps <= steps
    assert batch == 1 or sum(order.tile_sizes(order.steps - 1)) < batch


@pytest.mark.parametrize(
    ("counts", "samples", "wanted"),
    [
        ([10], 3, [0, 4, 9]),
        ([10], 10, list(range(10))),
        ([0, 3, 0, 2], 5, [0, 1, 2, 3, 4]),
        ([1] * 20, 20, list(range(20))),  # more than SHARDS are needed
        ([4] * 20, 5, [0, 23, 42, 59, 79]),
        ([3], 1, [0]),
    ],
)
def test_spread(counts: list[int], samples: int, wanted: list[int]) -> None:
    ids = spread(np.array(counts), samples)
    assert len(set(ids.tolist())) == samples and (np.diff(ids) > 0).all()
    if wanted[1:2] != [23]:
        assert ids.tolist() == wanted
    else:
        assert len({int(i) // 4 for i in ids}) <= SHARDS and ids[-1] == 79


def test_subset_has_the_images_of_the_whole(stripes_set: Path, tmp_path: Path) -> None:
    whole = load_manifest(stripes_set)
    make_subset(stripes_set.resolve(), whole, {"train": 26, "val": 9}, tmp_path / "small")
    small = load_manifest(tmp_path / "small")
    assert (small.classes, small.image) == (whole.classes, whole.image)
    assert small.split("train").samples == 26 and sum(small.split("train").class_counts) == 26
    sizes = [shard.samples for shard in small.split("train").shards]
    assert len(sizes) == SHARDS and len(set(sizes)) > 2, "shards of uneven sizes"
    mine = SplitReader(tmp_path / "small", small.split("train"))
    theirs = SplitReader(stripes_set, whole.split("train"))
    by_key = dict(zip((key for _, key in theirs.keys(np.arange(67))), theirs.read(np.arange(67)), strict=True))
    keys = [key for _, key in mine.keys(np.arange(26))]
    assert len(set(keys)) == 26 and mine.read(np.arange(26)) == [by_key[key] for key in keys]
    assert not list((tmp_path / "small").glob("*.tar")), "nothing was copied"


@pytest.mark.parametrize(
    ("text", "lanes", "wanted"),
    [
        ("", 8, (1, 2, 4)),
        ("", 3, (1, 2)),
        ("", 1, (1,)),
        ("2", 8, (1, 2)),
        ("8,1,2,2", 8, (1, 2, 8)),
        ("3", 3, (1, 3)),
    ],
)
def test_processes(text: str, lanes: int, wanted: tuple[int, ...]) -> None:
    assert choose_processes(text, Geometry(lanes * 4, 4)) == wanted


@pytest.mark.parametrize("text", ["9", "-1", "1;2", "1,", " "])
def test_processes_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match="--processes"):
        choose_processes(text, Geometry(32, 4))


@pytest.mark.parametrize(
    ("lanes", "processes", "reduction", "wanted"),
    [
        (8, 4, "tree", True),
        (8, 4, "ddp", False),
        (8, 3, "tree", False),
        (12, 3, "tree", True),
        (12, 4, "tree", False),
        (6, 1, "tree", False),
        (7, 7, "tree", True),
    ],
)
def test_where_bits_are_promised(lanes: int, processes: int, reduction: str, wanted: bool) -> None:
    config = from_flat({"global_batch_size": 4 * lanes, "tile_size": 4, "reduction": reduction})
    assert exact(config, processes) is wanted


def test_runs_of_all_checks(tmp_path: Path) -> None:
    config = from_flat({"epochs": 90, "warmup_epochs": 5, "mixed_precision": "fp16", "compile": True, "time_limit": 9})
    short = short_config(config, tmp_path / "data", tmp_path / "out")
    assert (short.optim.epochs, short.optim.warmup_epochs, short.run.mixed_precision) == (EPOCHS, 1.0, "no")
    assert (short.run.compile, short.run.threads, short.run.device, short.run.time_limit) == (False, 1, "cpu", 0.0)
    runs = {run.name: run for run in plan_runs(short, CHECKS, (1, 2, 4), 4, tmp_path)}
    assert {name: run.processes for name, run in runs.items()} == {
        "killed": 4,
        "resumed": 1,
        "1": 1,
        "2": 2,
        "4": 4,
        "precision": 1,
        "overfit": 1,
    }
    assert runs["killed"].config.output == runs["resumed"].config.output != runs["1"].config.output
    assert runs["killed"].config.run.checkpoint_every == 2 and runs["killed"].kill_at == 3
    assert runs["precision"].config.run.mixed_precision == "bf16"


@pytest.mark.parametrize(("steps", "every", "kill_at"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 2, 3), (9, 4, 5)])
def test_the_kill_is_in_the_middle_of_an_epoch(steps: int, every: int, kill_at: int, tmp_path: Path) -> None:
    """And behind a checkpoint; with one step an epoch it can only be at the end of one."""
    killed = plan_runs(short_config(TrainConfig(), tmp_path, tmp_path), ("resume",), (1,), steps, tmp_path)[0]
    assert (killed.config.run.checkpoint_every, killed.kill_at) == (every, kill_at)
    assert steps == 1 or every <= kill_at < steps


@pytest.mark.parametrize(
    ("checks", "wanted"),
    [
        (("overfit",), {"overfit"}),
        (("precision",), {"1", "precision"}),
        (("order",), {"1", "2"}),
        (("resume",), {"killed", "resumed", "2"}),  # DDP's bits hold for the same number of processes
    ],
)
def test_runs_of_one_check(checks: tuple[str, ...], wanted: set[str], tmp_path: Path) -> None:
    short = short_config(from_flat({"reduction": "ddp"}), tmp_path, tmp_path)
    assert {run.name for run in plan_runs(short, checks, (1, 2), 4, tmp_path)} == wanted  # type: ignore[arg-type]


def test_every_check_has_a_function_and_a_title() -> None:
    assert set(CHECK_FUNCTIONS) == set(CHECKS)
    assert all(Result(name).title for name in CHECKS)


FACTORS = [
    ([1, 1, 1, 1], [4, 4, 4, 4], 2, "every tile has entered once"),
    ([2, 2, 2, 2], [4, 4, 4, 4], 2, "the sum was multiplied by the 2 processes"),
    ([0.5, 0.5, 0.5, 0.5], [4, 4, 4, 4], 2, "the sum was divided by the 2 processes"),
    ([0.625] * 4, [3, 2, 3, 2], 2, "divided by the global batch (16) instead of the step's 10 samples"),
    ([3, 3, 3, 3], [4, 4, 4, 4], 2, "every tile has entered 3 times"),
    ([1, 1, 0, 0], [4, 4, 4, 4], 2, "rank 1 (lanes 2 to 3) did not enter the sum"),
    ([0, 0, 2, 2], [4, 4, 4, 4], 2, "only rank 1's tiles are in it: rank 0 (lanes 0 to 1) did not enter"),
    ([1, 0, 1, 1], [4, 4, 4, 4], 4, "rank 1 (lanes 1 to 1) did not enter the sum"),
    ([1, 1, 1, 3], [4, 4, 4, 4], 1, "the last tile (the last accumulation) entered 3 times instead of once"),
    ([1, 2, 1, 2], [4, 4, 4, 4], 2, "the last 2 tiles of the processes (the last accumulation) entered 2, 2 times"),
    ([10 / 12, 10 / 8, 10 / 12, 10 / 8], [3, 2, 3, 2], 1, "each tile's mean counts alike"),
    ([1, 5, 2, 1], [4, 4, 4, 4], 1, "the tiles have entered 1, 5, 2, 1 times"),
]


@pytest.mark.parametrize(("factors", "sizes", "processes", "words"), FACTORS)
def test_blame(factors: list[float], sizes: list[int], processes: int, words: str) -> None:
    config = from_flat({"global_batch_size": 16, "tile_size": 4})
    noise = torch.Generator().manual_seed(3)
    shares = {lane: torch.randn(50, generator=noise) for lane in range(4)}
    got = sum((factor * share for factor, share in zip(factors, shares.values(), strict=True)), torch.zeros(50))
    found, rest = blame.factors_of(shares, got)
    assert list(found.values()) == pytest.approx(factors, abs=1e-5) and rest < 1e-5
    assert words in blame.explain(found, rest, sizes, config, processes)
    assert "no sum of what" in blame.explain(*blame.factors_of(shares, got.roll(1)), sizes, config, processes)


def test_blame_passes_over_empty_tiles() -> None:
    config = from_flat({"global_batch_size": 4, "tile_size": 1})
    assert "rank 3 (lanes 3 to 3)" in blame.explain({1: 1.0, 3: 0.0}, 0.0, [0, 1, 0, 1], config, 4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_by_hand(schedule: str) -> None:
    optim = from_flat({"epochs": 3, "warmup_epochs": 1, "lr": 0.8, "schedule": schedule}).optim
    found = [learning_rate(optim, 4, step) for step in (0, 1, 3, 4, 8, 11)]
    after = {
        "cosine": [0.8, 0.4, 0.4 * (1 + math.cos(math.pi * 7 / 8))],
        "linear": [0.8, 0.4, 0.1],
        "constant": [0.8] * 3,
    }
    assert found == pytest.approx([0.2, 0.4, 0.8, *after[schedule]])


def test_relative_difference() -> None:
    ones = {"a": torch.ones(4), "b": torch.ones(5)}
    assert relative(ones, ones) == 0
    assert relative({"a": torch.ones(4), "b": torch.tensor([1, 1, 1, 1, 1.3])}, ones) == pytest.approx(0.1)
    assert relative({"a": torch.full((4,), torch.nan), "b": ones["b"]}, ones) == math.inf
    norm = math.sqrt(sum(float(t.square().sum()) for t in clipped(ones, 0.5).values()))
    assert norm == pytest.approx(0.5, rel=1e-5) and relative(clipped(ones, 0), ones) == 0


@pytest.mark.parametrize(
    ("number", "noun", "wanted"),
    [(1, "step", "1 step"), (2, "step", "2 steps"), (1, "process", "1 process"), (4, "process", "4 processes")],
)
def test_plural(number: int, noun: str, wanted: str) -> None:
    assert plural(number, noun) == wanted


def test_few() -> None:
    assert few([1, 2, 3]) == "1, 2, 3" and few(list(range(9))) == "0, 1, 2, 3 and 5 more"


def report(*results: Result) -> Report:
    return Report(results, (1, 2), {"data": "<b>&"}, {"lr": 1.0}, [], 3.2)


@pytest.mark.parametrize(
    ("results", "headline", "passed"),
    [
        ([Result("runs"), Result("order"), Result("pixels")], "all 2 checks passed, on 1 and 2 processes", True),
        ([Result("runs"), Result("order")], "1 check passed, on 1 and 2 processes", True),
        ([Result("runs"), Result("order"), Result("batchnorm", skipped="none")], "1 check passed", True),
        ([Result("runs", problems=["x"]), Result("order", problems=["y"])], "1 check of 1 failed: sample order", False),
        ([Result("runs", problems=["x"]), Result("order")], "a run failed", False),
    ],
)
def test_headline(results: list[Result], headline: str, passed: bool) -> None:
    found = report(*results)
    assert found.headline.startswith(headline) and found.passed is passed


WHOLE = ("order", "pixels", "gradients", "accumulation", "schedule")


@pytest.mark.parametrize(
    ("names", "bad", "processes", "exact", "verdict"),
    [
        (WHOLE, "", (1, 2), True, "The same run"),
        (WHOLE, "", (1, 2), False, "The same run, up to rounding"),
        (WHOLE, "", (1,), True, "Passed"),
        (WHOLE[1:], "", (1, 2), True, "Passed"),
        (WHOLE, "pixels", (1, 2), True, "Not the same run"),
        ((*WHOLE, "overfit"), "overfit", (1, 2), True, "A check failed"),
        (("resume",), "resume", (1, 2), True, "Not the same run"),
    ],
)
def test_verdict(names: tuple[str, ...], bad: str, processes: tuple[int, ...], exact: bool, verdict: str) -> None:
    """Nothing is claimed that was not looked at."""
    results = [Result(name, problems=["x"] * (name == bad)) for name in names]
    assert Report(results, processes, {}, {}, [], 1.0, exact).verdict == verdict


def test_report_escapes_and_is_whole(tmp_path: Path) -> None:
    bad = Result("order", "<script>", problems=["sample '\"<i>"], figures={"worst": math.inf, "list": [math.nan]})
    found = report(Result("runs"), bad, Result("batchnorm", skipped="there is none"))
    write_report(found, tmp_path)
    page = (tmp_path / "certificate.html").read_text()
    assert page == render(found) and "<script>" not in page and "<i>" not in page and "<b>" not in page
    assert "&lt;script&gt;" in page and "there is none" in page and 'class="fail"' in page
    saved = json.loads((tmp_path / "verify.json").read_text(), parse_constant=pytest.fail)
    assert saved["checks"][1]["figures"] == {"worst": "inf", "list": ["nan"]}
    assert [check["verdict"] for check in saved["checks"]] == ["pass", "fail", "skip"]


def test_config_of_the_user_is_kept(tmp_path: Path) -> None:
    config = TrainConfig()
    short = short_config(config, tmp_path, tmp_path)
    for name in ("global_batch_size", "tile_size", "optimizer", "lr", "weight_decay", "schedule", "mixup"):
        assert getattr(short.optim, name) == getattr(config.optim, name)
    assert short.model == config.model and short.run.seed == config.run.seed
    assert short.run.reduction == config.run.reduction
