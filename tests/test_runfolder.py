from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distcnn import checkpoint
from distcnn.config import TrainConfig, flatten, from_flat, load_toml
from distcnn.errors import UserError
from distcnn.runfolder import append_row, check_same_run, cut_rows, open_run, read_rows, save_config


def config_for(run: Path, **values: Any) -> TrainConfig:
    return from_flat({"output": str(run), "data": "/somewhere", **values})


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, step, {"w": torch.ones(1)}, None, {}, {})


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_folder_gets_its_config(tmp_path: Path) -> None:
    run = tmp_path / "a" / "b"
    config = config_for(run, lr=0.5)
    assert open_run(config) == (None, [])
    assert contents(run) == ["config.toml", "logs"] and load_toml(run / "config.toml") == config


def test_the_same_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run = tmp_path / "r"
    open_run(config_for(run))
    save(run, 3)
    newest = save(run, 7)
    changed = config_for(run, threads=3, wandb_name="x", data="/elsewhere", quiet=True)
    assert open_run(changed) == (newest, [])
    assert load_toml(run / "config.toml") == config_for(run), "not yet sure that it goes on"
    save_config(changed)
    assert load_toml(run / "config.toml").run.threads == 3
    assert (
        open_run(config_for(run, resume=str(run / "checkpoints" / "step_00000003")))[0]
        == run / "checkpoints" / "step_00000003"
    )
    assert open_run(config_for(run, resume=str(run / "checkpoints" / "latest")))[0] == newest
    assert not list(tmp_path.glob("*.old*")), "nothing is moved aside"


def test_another_run_is_refused_with_all_differences_and_nothing_is_changed(tmp_path: Path) -> None:
    run = tmp_path / "r"
    open_run(config_for(run))
    save(run, 3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        open_run(config_for(run, lr=0.1, channels=[8], seed=4, threads=2))
    assert str(caught.value) == (
        f"{run} holds another run (channels was [32, 64], now [8], lr was 0.003, now 0.1, seed was 0, now 4):"
        " give a new --output, or --resume never to begin anew"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_version_may_lack_a_setting() -> None:
    values = flatten(TrainConfig())
    del values["cutmix"]
    with pytest.raises(UserError, match=r"cutmix was None, now 0\.0"):
        check_same_run(TrainConfig(), values, "x")
    check_same_run(TrainConfig(), json.loads(json.dumps(flatten(TrainConfig()))) | {"extra": 1}, "x")


def test_never_moves_the_old_run_aside(tmp_path: Path) -> None:
    run = tmp_path / "r"
    for number in range(3):
        assert open_run(config_for(run, resume="never", seed=number)) == (None, [])
        save(run, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "r.old1", "r.old2"]
    seeds = {path.name: load_toml(path / "config.toml").run.seed for path in tmp_path.iterdir()}
    assert seeds == {"r.old1": 0, "r.old2": 1, "r": 2}
    assert (tmp_path / "r.old2" / "checkpoints" / "step_00000001").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "is no checkpoint"),
        ("r", "is no checkpoint"),
        ("r/checkpoints/step_00000003", "is missing or truncated"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, name: str, said: str) -> None:
    path = save(tmp_path / "r", 3)
    (path / "trainer.pt").write_bytes(b"")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=said):
        open_run(config_for(tmp_path / "new", resume=str(tmp_path / name)))
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    run = tmp_path / "r"
    open_run(config_for(run))
    good, bad = save(run, 3), save(run, 4)
    (bad / "model.safetensors").write_bytes(b"")
    found, warnings = open_run(config_for(run))
    assert found == good
    assert warnings == [f"{bad / 'model.safetensors'} is missing or truncated: going back to the checkpoint before"]
    (good / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint of .* can be used .*: --resume never begins anew"):
        open_run(config_for(run))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds files of something else: give another folder"):
        open_run(config_for(tmp_path))
    assert contents(tmp_path) in (["thesis.tex"], ["logs", "thesis.tex"])


@pytest.mark.parametrize("run", ["file", "file/under"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as caught:
        open_run(config_for(tmp_path / run))
    assert f"--output {tmp_path / run} cannot be written: " in str(caught.value)


def test_a_config_that_was_damaged_is_said(tmp_path: Path) -> None:
    open_run(config_for(tmp_path / "r"))
    (tmp_path / "r" / "config.toml").write_text("lr = \n")
    with pytest.raises(UserError, match=r"r/config.toml is not valid TOML"):
        open_run(config_for(tmp_path / "r"))


def test_rows_are_appended_read_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    assert read_rows(file) == []
    cut_rows(file, lambda row: True)
    assert not file.exists()
    rows = [{"step": n, "text": 'a\u2028b\n"ä'} for n in range(5)]
    for row in rows:
        append_row(file, row)
    assert read_rows(file) == rows and file.read_text().count("\n") == 5
    cut_rows(file, lambda row: row["step"] <= 2)
    assert read_rows(file) == rows[:3]
    append_row(file, rows[3])
    assert read_rows(file) == rows[:4]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_last_row_cut_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "m.jsonl"
    append_row(file, {"step": 1})
    append_row(file, {"step": 2, "text": "ä"})
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    rows = read_rows(file)
    assert rows == [{"step": 1}] if cut > 1 else rows[1:] == [{"step": 2, "text": "ä"}]
    cut_rows(file, lambda row: True)
    append_row(file, {"step": 3})
    assert read_rows(file) == [*rows, {"step": 3}]


def test_what_is_no_finite_number_is_null(tmp_path: Path) -> None:
    """Strict readers of JSON refuse NaN and Infinity."""
    append_row(tmp_path / "m.jsonl", {"step": 1, "train/loss": float("nan"), "train/grad_norm": float("inf")})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "train/loss": null, "train/grad_norm": null}\n'
