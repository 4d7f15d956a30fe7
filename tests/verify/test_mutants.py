"""Each fault that is put into the trainer makes `distcnn verify` fail, with words that name the cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from distcnn.config import from_flat
from distcnn.verify.evidence import Evidence
from distcnn.verify.launch import Trace
from distcnn.verify.plan import CheckName
from distcnn.verify.run_checks import check_runs
from tests.verify.mutants import MUTANTS
from tests.verify.runs import check

# mutant -> (the check that finds it, the words that name it)
FOUND: dict[str, list[tuple[CheckName, str]]] = {
    "sharded_twice": [("order", "each process sees 1 of 2 of its own: the data are sharded twice")],
    "repeats_a_sample": [("order", "with 1 process, epoch 0: 1 sample more than once")],
    "worker_randomness": [("pixels", "draws must be keyed by (seed, epoch, sample)")],
    "last_accumulation_undivided": [
        ("gradients", "with 2 processes the gradient of step 0 is"),
        ("gradients", "the last 2 tiles of the processes (the last accumulation) entered 2, 2 times instead of once"),
        ("gradients", "the last tile (the last accumulation) entered 2 times instead of once"),
    ],
    "divided_by_the_batch": [("accumulation", "divided by the global batch (16) instead of the step's 10 samples")],
    "last_rank_statistics": [("batchnorm", "only rank 1's tiles are in it: rank 0 (lanes 0 to 1) did not enter")],
    "each_ranks_statistics": [
        ("batchnorm", "with 2 processes rank 1 has other buffers than rank 0 at step 1"),
        ("batchnorm", "only rank 0's tiles are in it"),
    ],
    "schedule_steps_with_the_ranks": [("schedule", "the schedule goes 2 steps at a time")],
    "drops_a_rank": [("gradients", "rank 1 (lanes 2 to 3) did not enter the sum")],
    "another_order": [("gradients", "in its last bits"), ("gradients", "the sum was made in another order")],
    "unsummed_weights": [("gradients", "rank 1 has other gradients than rank 0 at step 0: they were not summed")],
}


def test_every_mutant_is_in_the_table() -> None:
    assert set(FOUND) == {mutant.__name__ for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", FOUND)
def test_mutant_is_caught(mutant: str, evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of(mutant)
    for name, words in FOUND[mutant]:
        problems = check(name, evidence).problems
        assert any(words in problem for problem in problems), problems


USUAL: tuple[CheckName, ...] = (
    "order",
    "pixels",
    "gradients",
    "batchnorm",
    "accumulation",
    "schedule",
    "evaluation",
    "finite",
)


@pytest.mark.parametrize("name", USUAL)
def test_the_trainer_as_it_is_passes(name: CheckName, evidence_of: Callable[[str], Evidence]) -> None:
    found = check(name, evidence_of(""))
    assert not found.problems and not found.skipped
    assert found.measured and found.demanded


def test_figures_of_the_trainer_as_it_is(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("")
    assert check("gradients", evidence).figures["steps/2"] == 4, "all steps of two epochs, to the bit"
    assert check("order", evidence).figures == {"samples": 67, "trained": 2 * 2 * 26}
    assert check("accumulation", evidence).figures["samples"] == 10


def test_reduction_in_another_order_is_fine_where_it_is_not_promised(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("another_order")
    loose = dataclasses.replace(evidence, config=from_flat({"reduction": "ddp"}, base=evidence.config))
    assert not check("gradients", loose).problems


def test_a_run_that_fails_is_a_finding(evidence_of: Callable[[str], Evidence]) -> None:
    evidence = evidence_of("")
    run = dataclasses.replace(evidence.traces["2"].run, name="2")
    broken = Trace(run, trouble="RuntimeError: it broke")
    hurt = dataclasses.replace(evidence, traces={**evidence.traces, "2": broken})
    assert check_runs(hurt).problems == ["the run with 2 processes failed: RuntimeError: it broke"]
    for name in USUAL:
        assert "the run with 2 processes did not come to its end" in check(name, hurt).problems, name
