"""What a run has left is looked at: a changed bit, number or row is found by the check whose business it is."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distcnn import checkpoint
from distcnn.config import from_flat
from distcnn.verify.evidence import Evidence
from distcnn.verify.launch import Trace
from distcnn.verify.plan import CheckName
from tests.verify.runs import check


@pytest.fixture
def tampered(evidence_of: Callable[[str], Evidence], tmp_path: Path) -> Callable[..., Evidence]:
    """Good evidence in which one run, called `name`, has been changed by a function of its run folder."""

    def make(name: str, change: Callable[[Path], None], **more: Trace) -> Evidence:
        evidence = evidence_of("")
        trace = evidence.traces["2" if name == "2" else "1"]
        folder = Path(shutil.copytree(trace.run.config.output, tmp_path / name, symlinks=True))
        change(folder)
        run = dataclasses.replace(
            trace.run, name=name, config=from_flat({"output": str(folder)}, base=trace.run.config)
        )
        changed = Trace(run, ranks=trace.ranks)
        return dataclasses.replace(evidence, traces={**evidence.traces, **more, name: changed})

    return make


def in_metrics(find: str, put: str) -> Callable[[Path], None]:
    """Change the first training step's row."""

    def change(folder: Path) -> None:
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        rows[0] = re.sub(find, put, rows[0])
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")

    return change


def in_results(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        results = json.loads((folder / "results.json").read_text())
        change(results)
        (folder / "results.json").write_text(json.dumps(results))

    return write


def in_checkpoint(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change weights or the optimizer's state at the end of the run."""

    def write(folder: Path) -> None:
        path = checkpoint.newest_whole(folder)[0]
        assert path is not None
        saved = checkpoint.load(path)
        change(saved.model, saved.trainer)
        checkpoint.save(folder, checkpoint.step_of(path), saved.model, saved.ema, saved.trainer, saved.state)

    return write


def one_bit(model: dict[str, torch.Tensor], trainer: dict[str, Any]) -> None:
    bias = model["head.1.bias"]
    bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))


def forget_momentum(model: dict[str, torch.Tensor], trainer: dict[str, Any]) -> None:
    trainer["optimizer"]["state"][0]["exp_avg"].zero_()


def make_nan(model: dict[str, torch.Tensor], trainer: dict[str, Any]) -> None:
    model["head.1.bias"][0] = torch.nan


def miscount(results: dict[str, Any]) -> None:
    results["confusion"][0][0] += 1


TAMPERED: list[tuple[CheckName, str, Callable[[Path], None], str]] = [
    ("resume", "resumed", lambda folder: None, ""),
    ("resume", "resumed", in_checkpoint(one_bit), "the weights at the end differ by"),
    ("resume", "resumed", in_checkpoint(forget_momentum), "the optimizer's state at the end is another"),
    ("resume", "resumed", in_metrics(r'"train/loss": ', '"train/loss": 1'), "the loss is another in 1 step: 1"),
    ("evaluation", "2", in_results(miscount), "38 samples were counted of 37"),
    ("evaluation", "1", in_results(lambda r: r.update({"val/loss": 1.01 * r["val/loss"]})), "by a plain loop"),
    (
        "evaluation",
        "2",
        in_results(lambda r: r.update({"val/top1": 0.123})),
        "the same weights were found to be others",
    ),
    ("precision", "precision", in_metrics(r'"train/loss": ', '"train/loss": 1'), "the first loss is"),
    ("precision", "precision", in_metrics(r'"train/loss": [^,]*', '"train/loss": null'), "the first loss is nan"),
    (
        "finite",
        "2",
        in_metrics(r'"train/grad_norm": [^,}]*', '"train/grad_norm": null'),
        "train/grad_norm of step 0",
    ),
    ("finite", "2", in_checkpoint(make_nan), "head.1.bias of"),
    ("schedule", "2", in_metrics(r'"train/lr": ', '"train/lr": 1'), "logs other learning rates than those used"),
    ("order", "2", lambda folder: (folder / "ledger.jsonl").unlink(), "does not prove epoch 0"),
]


@pytest.mark.parametrize(("name", "run", "change", "words"), TAMPERED)
def test_tampered_evidence(
    name: CheckName,
    run: str,
    change: Callable[[Path], None],
    words: str,
    tampered: Callable[..., Evidence],
    evidence_of: Callable[[str], Evidence],
) -> None:
    one = evidence_of("").traces["1"]
    killed = Trace(dataclasses.replace(one.run, name="killed", kill_at=1))
    resumed = {"killed": killed} if name == "resume" else {}
    evidence = tampered(run, change, **resumed)
    if name == "resume":  # it pretends to have gone on from step 1
        ranks = [[{**row, "total": 1} if row["kind"] == "start" else row for row in one.ranks[0]]]
        evidence.traces["resumed"] = dataclasses.replace(evidence.traces["resumed"], ranks=ranks)
    problems = check(name, evidence).problems
    assert any(words in problem for problem in problems) if words else not problems, problems


@pytest.mark.parametrize(
    ("tries", "in_time", "verdict", "words"),
    [
        ({"0.1": [2.3, 1.0, 0.04]}, True, "pass", "loss 2.3 to 0.04 in 3 steps at lr 0.1"),
        ({"0.1": [2.3, 9.0, float("nan")], "0.01": [2.3, 0.03]}, True, "pass", "at lr 0.01"),
        ({"0.1": [2.3, 1.5], "0.01": [2.3, 2.0]}, True, "fail", "stays at 1.5 after 2 steps, at any of --lr 0.1, 0.01"),
        ({"0.1": [float("nan")]}, True, "fail", "stays at nan"),
        ({"0.1": [2.3, 1.5]}, False, "skip", "in the time there was"),
    ],
)
def test_overfitting(
    tries: dict[str, list[float]], in_time: bool, verdict: str, words: str, evidence_of: Callable[[str], Evidence]
) -> None:
    evidence = evidence_of("")
    row = {"kind": "overfit", "tries": tries, "target": 0.05, "in_time": in_time}
    trace = Trace(dataclasses.replace(evidence.traces["1"].run, name="overfit"), ranks=[[row]])
    found = check("overfit", dataclasses.replace(evidence, traces={"overfit": trace}))
    assert found.verdict == verdict
    assert words in " ".join([found.measured, found.skipped, *found.problems])
