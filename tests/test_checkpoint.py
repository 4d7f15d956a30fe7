from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distcnn import checkpoint
from distcnn.errors import UserError
from distcnn.files import sha256_of
from tests.support import clean_environment, command, python

FILES = ["ema.safetensors", "manifest.json", "model.safetensors", "state.json", "trainer.pt"]


def state_of(step: int) -> dict[str, Any]:
    """What a run would save, every value telling the step. The weight is in channels_last, as a model's are."""
    weight = torch.full((2, 3, 4, 4), float(step)).contiguous(memory_format=torch.channels_last)
    return {
        "model": {"weight": weight, "count": torch.tensor(step)},
        "ema": {"weight": weight + 0.5},
        "trainer": {"optimizer": {"state": {0: {"exp_avg": weight * 2}}, "param_groups": [{"lr": 0.1}]}, "scaler": {}},
        "state": {"position": {"total": step}, "text": "ä"},
    }


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, step, **state_of(step))


def steps(run: Path) -> list[int]:
    return sorted(checkpoint.step_of(p) for p in (run / "checkpoints").iterdir() if checkpoint.step_of(p) >= 0)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 123)
    assert path == tmp_path / "checkpoints" / "step_00000123"
    assert sorted(file.name for file in path.iterdir()) == FILES
    found, expected = checkpoint.load(path), state_of(123)
    assert found.ema is not None
    assert torch.equal(found.model["weight"], expected["model"]["weight"]) and found.model["count"] == 123
    assert torch.equal(found.ema["weight"], expected["ema"]["weight"])
    assert torch.equal(found.trainer["optimizer"]["state"][0]["exp_avg"], expected["model"]["weight"] * 2)
    assert found.state == {"version": 1, "position": {"total": 123}, "text": "ä"}


def test_without_averaged_weights_there_is_no_such_file(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, **{**state_of(1), "ema": None})
    assert not (path / "ema.safetensors").exists() and checkpoint.load(path).ema is None


@pytest.mark.parametrize(
    ("name", "step"),
    [("step_00000007", 7), ("step_123456789", 123456789), ("step_7", -1), (".tmp-step_00000007", -1), ("latest", -1)],
)
def test_the_step_in_a_name(name: str, step: int) -> None:
    assert checkpoint.step_of(Path("x") / name) == step


def test_links_and_pruning_keep_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.point(tmp_path, "best", tmp_path / "checkpoints" / "step_00000001")
    for step in (4, 5):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [1, 4, 5]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_00000005"
    assert not (tmp_path / "checkpoints" / "latest").readlink().is_absolute(), "a run folder may be moved"
    checkpoint.point(tmp_path, "best", tmp_path / "checkpoints" / "step_00000005")
    checkpoint.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [5]
    checkpoint.prune(tmp_path, keep=9)
    assert steps(tmp_path) == [5]


def test_the_same_step_saved_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = checkpoint.save(tmp_path, 5, **{**state_of(5), "state": {"epoch": 1}})
    assert checkpoint.load(path).state["epoch"] == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step_00000005"]


def damage(path: Path, kind: str, name: str) -> None:
    file = path / name
    data = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "removed":
        file.unlink()
    else:
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("kind", ["truncated", "emptied", "removed", "bit-flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path: Path, kind: str, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path, kind, name)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    # A flipped bit of the manifest shows in what it says of another file: the folder is what can be relied on.
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if name != "manifest.json":
        assert str(path / name) in str(caught.value)
    found, complaints = checkpoint.newest_whole(tmp_path)
    assert found == tmp_path / "checkpoints" / "step_00000001" and len(complaints) == 1
    assert str(path) in complaints[0]


def test_every_single_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Whatever bit flips there: refused, or without consequence; never an exception of another kind."""
    path = checkpoint.save(tmp_path, 1, {"w": torch.ones(1)}, None, {}, {})
    good = (path / "manifest.json").read_bytes()
    for at in range(len(good)):
        for bit in (0, 5):
            (path / "manifest.json").write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            if not checkpoint.verify(path):
                assert checkpoint.load(path).model["w"] == 1


FILE_LISTS = ["[]", "{}", "3", '"x"', '{"model.safetensors": 3, "trainer.pt": 3, "state.json": 3}']


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"version": 1}', *(f'{{"version": 1, "files": {f}}}' for f in FILE_LISTS)]
)
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    assert str(path / "manifest.json") in checkpoint.verify(path)


def test_another_version_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
    assert "has version 2, this program reads 1" in checkpoint.verify(path)


class Payload:
    """What a hostile pickle does: here it creates a file, to be seen."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_payload_in_a_checkpoint_with_right_checksums_is_not_run(tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "trace"
    path = save(tmp_path, 1)
    file = path / "trainer.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"optimizer": Payload(trace)}, protocol=2))
        pickle.loads(file.read_bytes())
    else:
        torch.save({"optimizer": Payload(trace)}, file)
        torch.load(file, weights_only=False)
    assert trace.exists(), "the payload must work, or this proves nothing"
    trace.unlink()
    listing = json.loads((path / "manifest.json").read_text())
    listing["files"]["trainer.pt"] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (path / "manifest.json").write_text(json.dumps(listing))
    assert checkpoint.verify(path) == ""
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert not trace.exists() and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path) == (None, [])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").touch()
    assert checkpoint.newest_whole(tmp_path) == (None, [])


# Saves again and again; says when a save begins, so that the kill comes in the middle of one.
SAVES = """
import sys
from pathlib import Path
import torch
from distcnn import checkpoint
run = Path(sys.argv[1])
big = {"w": torch.zeros(12_000_000)}
for step in range(1, 1000):
    print(step, flush=True)
    checkpoint.save(run, step, big, big, {"optimizer": big}, {"position": step})
    checkpoint.prune(run, 2)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            deadline = time.monotonic() + 10
            while not (tmp_path / "checkpoints" / ".tmp-step_00000003").exists():
                assert time.monotonic() < deadline
            time.sleep(0.03)
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "checkpoints" / ".tmp-step_00000003").exists(), "killed in the middle"
    found, complaints = checkpoint.newest_whole(tmp_path)
    assert found is not None and checkpoint.step_of(found) == 2 and not complaints
    assert checkpoint.load(found).state["position"] == 2
    save(tmp_path, 4)
    checkpoint.prune(tmp_path, 2)
    assert not list((tmp_path / "checkpoints").glob(".tmp*")), "the next save clears it away"


# A limit on the size of files stands in for a full disk. It is met in each of the files in turn.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from distcnn import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run, small, big = Path("."), {"w": torch.zeros(10)}, {"w": torch.zeros(100_000)}
checkpoint.save(run, 1, small, small, small, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for step, where in enumerate(range(4), 2):
    parts = [big if place == where else small for place in range(4)]
    try:
        checkpoint.save(run, step, *parts[:3], {"text": "x" * 100_000} if where == 3 else {})
    except OSError as error:
        print(f"refused: {error}")
    assert not list(run.glob("checkpoints/.*")), "nothing is left behind"
writer = checkpoint.Writer(run, 2, print)
writer.save(9, big, None, small, {})
writer.wait()
writer.save(10, small, None, small, {}, best=True)
writer.wait()
"""


def test_a_full_disk_is_an_os_error_and_the_next_save_tries_again(tmp_path: Path) -> None:
    done = command(python("-c", FULL_DISK), tmp_path, 60)
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert [line.startswith("refused: ") and "File too large" in line for line in lines[:4]] == [True] * 4, lines
    assert lines[4].startswith("checkpoint at step 9 not written (") and "File too large" in lines[4]
    assert steps(tmp_path) == [1, 10] and (tmp_path / "checkpoints" / "best").resolve().name == "step_00000010"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        save(tmp_path, 1)


def test_the_writer_copies_before_it_returns(tmp_path: Path) -> None:
    """Training goes on while it writes: what is written is what there was."""
    writer = checkpoint.Writer(tmp_path, 3, pytest.fail)
    tensor = torch.zeros(2_000_000)
    nested = {"state": {0: {"m": tensor}}, "groups": [{"params": [0]}]}
    losses = [1.0]
    writer.save(1, {"w": tensor}, {"w": tensor}, nested, {"losses": losses})
    tensor += 1
    losses[0] = 2.0
    writer.wait()
    found = checkpoint.load(tmp_path / "checkpoints" / "step_00000001")
    assert found.ema is not None
    assert not found.model["w"].any() and not found.ema["w"].any() and not found.trainer["state"][0]["m"].any()
    assert found.state["losses"] == [1.0] and found.trainer["groups"] == [{"params": [0]}]
    assert writer.seconds > 0


def test_the_writer_saves_one_after_the_other_in_order(tmp_path: Path) -> None:
    writer = checkpoint.Writer(tmp_path, 2, pytest.fail)
    for step in range(1, 6):
        writer.save(step, **state_of(step), best=step == 2)
    writer.wait()
    assert steps(tmp_path) == [2, 4, 5]
    assert threading.active_count() == 1 or all(t.name != "checkpoint" for t in threading.enumerate())
