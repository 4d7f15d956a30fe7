"""Checkpoints that exist whole or do not exist.

checkpoints/step_00000123/ holds model.safetensors, ema.safetensors, trainer.pt (optimizer and loss scaling, read with
weights_only), state.json (position, ledger, metrics) and manifest.json (size and sha256 of each). A save goes to a
temporary folder, is fsynced, then renamed; `latest` and `best` are links replaced atomically; old ones go last.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from distcnn.errors import UserError
from distcnn.files import sha256_of, sync_folder, write_atomically

CHECKPOINT_VERSION = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d{8,})")
MANIFEST = "manifest.json"
_NEEDED = ("model.safetensors", "trainer.pt", "state.json")
_TEMPORARY, _ASIDE = ".tmp-", ".old-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into memory (tensors on the CPU)."""

    path: Path
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    trainer: dict[str, Any]
    state: dict[str, Any]


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name, -1 if it is none."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def save(
    run: Path,
    step: int,
    model: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor] | None,
    trainer: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Path:
    """Write checkpoint `step` of the run folder; returns its folder. Raises OSError with nothing changed."""
    parent = run / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    final, temporary, aside = (parent / f"{mark}step_{step:08d}" for mark in ("", _TEMPORARY, _ASIDE))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_files(temporary, step, model, ema, trainer, state)
        if final.exists():  # the same step once more, after its epoch was closed
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        temporary.rename(final)
    except (RuntimeError, safetensors.SafetensorError) as error:  # how torch and safetensors report a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise _os_error(error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(parent)
    shutil.rmtree(aside, ignore_errors=True)
    point(run, "latest", final)
    return final


def _os_error(error: Exception) -> OSError:
    """The operating system's error behind one of torch's or safetensors', which is a Rust text with its number."""
    if isinstance(error.__context__, OSError):
        return error.__context__
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(errno.EIO, str(error))


def _write_files(
    folder: Path,
    step: int,
    model: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor] | None,
    trainer: Mapping[str, Any],
    state: Mapping[str, Any],
) -> None:
    """The files of a checkpoint, and their manifest, down to the disk."""
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.items()}, folder / "model.safetensors")
    if ema is not None:
        safetensors.torch.save_file({k: v.contiguous() for k, v in ema.items()}, folder / "ema.safetensors")
    with (folder / "trainer.pt").open("wb") as file:
        torch.save(dict(trainer), file)
    document = {"version": CHECKPOINT_VERSION, **state}
    (folder / "state.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(folder.iterdir())}
    listing = {"version": CHECKPOINT_VERSION, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    for file_path in folder.iterdir():
        _sync_file(file_path)
    sync_folder(folder)


class Writer:
    """Saves in a thread: `save` copies the state and returns; training waits only while the one before is unfinished.

    A save that fails (disk full, quota) becomes a warning: the old checkpoints stay, and the next save tries again.
    """

    def __init__(self, run: Path, keep: int, warn: Callable[[str], None]) -> None:
        self._run, self._keep, self._warn = run, keep, warn
        self._thread: threading.Thread | None = None
        self.seconds = 0.0  # that the longest save so far took: how much time the next one needs
        self.failed = ""  # why the last save that has ended failed

    def save(
        self,
        step: int,
        model: Mapping[str, torch.Tensor],
        ema: Mapping[str, torch.Tensor] | None,
        trainer: Mapping[str, Any],
        state: Mapping[str, Any],
        best: bool = False,
    ) -> None:
        """Begin to write checkpoint `step`; with `best`, make it the best one."""
        self.wait()
        arguments = (step, _copy(model), _copy(ema), _copy(trainer), _copy(state), best)
        self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, step: int, model: Any, ema: Any, trainer: Any, state: Any, best: bool) -> None:
        started = time.monotonic()
        self.failed = ""
        try:
            path = save(self._run, step, model, ema, trainer, state)
            if best:
                point(self._run, "best", path)
            prune(self._run, self._keep)
        except OSError as error:
            self.failed = str(error.strerror or error)
            self._warn(
                f"checkpoint at step {step} not written ({self.failed}); the last one stays, the next save tries again"
            )
        self.seconds = max(self.seconds, time.monotonic() - started)


def _copy(value: Any) -> Any:
    """A copy on the CPU of nested dicts and lists of tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copy(part) for name, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list) else value


def point(run: Path, name: str, target: Path) -> None:
    """Make checkpoints/`name` a link to a checkpoint beside it, atomically."""
    link, temporary = run / FOLDER / name, run / FOLDER / f".tmp-{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(link)
    sync_folder(link.parent)


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the best, and what a killed save left behind."""
    parent = run / FOLDER
    best = (parent / "best").resolve() if (parent / "best").is_symlink() else None
    whole = sorted((p for p in parent.iterdir() if step_of(p) >= 0), key=step_of)
    for path in whole[:-keep]:
        if path.resolve() != best:
            shutil.rmtree(path)
    for mark in (_TEMPORARY, _ASIDE):
        for path in parent.glob(f"{mark}step_*"):
            shutil.rmtree(path)


def verify(path: Path) -> str:
    """ "" if every file of a checkpoint is there with its size and sha256, else what is wrong."""
    try:
        listing = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if listing["version"] != CHECKPOINT_VERSION:
            return f"{path / MANIFEST} has version {listing['version']}, this program reads {CHECKPOINT_VERSION}"
        missing = [name for name in _NEEDED if name not in listing["files"]]
        if missing:
            return f"{path / MANIFEST} does not list {missing[0]}"
        for name, facts in dict(listing["files"]).items():
            file = path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"]:
                return f"{file} is missing or truncated"
            if sha256_of(file) != facts["sha256"]:
                return f"{file} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return ""


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying it. Raises UserError that names the damaged file."""
    wrong = verify(path)
    if wrong:
        raise UserError(f"checkpoint {path} cannot be used: {wrong}")
    ema = path / "ema.safetensors"
    try:
        return Checkpoint(
            path=path,
            model=safetensors.torch.load_file(path / "model.safetensors"),
            ema=safetensors.torch.load_file(ema) if ema.exists() else None,
            trainer=load_tensors(path / "trainer.pt"),
            state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        )
    except (pickle.UnpicklingError, RuntimeError, safetensors.SafetensorError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} was not written by this program: {reason}") from error


def load_tensors(file: Path) -> Any:
    """What torch.save has written, without running anything in it. Raises ValueError for a zip bomb."""
    data = io.BytesIO(file.read_bytes())
    if zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"{file.name} is compressed, as torch never writes it")
    data.seek(0)
    return torch.load(data, map_location="cpu", weights_only=True)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that verifies or None, what is wrong with each newer one)."""
    complaints: list[str] = []
    parent = run / FOLDER
    for aside in parent.glob(f"{_ASIDE}step_*"):  # a save was killed between its two renames
        if not (final := aside.with_name(aside.name.removeprefix(_ASIDE))).exists():
            aside.rename(final)
    found = [p for p in parent.iterdir() if step_of(p) >= 0 and p.is_dir()] if parent.is_dir() else []
    for path in sorted(found, key=step_of, reverse=True):
        wrong = verify(path)
        if not wrong:
            return path, complaints
        complaints.append(wrong)
    return None, complaints


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, given one, a link to one, or a run folder (then its best, else its latest).

    Raises UserError that says what is there instead.
    """
    for folder in (path, path / FOLDER / "best", path / FOLDER / "latest"):
        if (folder / "state.json").is_file():
            return folder.resolve()
    if not path.exists():
        raise UserError(f"no checkpoint {path}: give a folder such as runs/x/checkpoints/best, or the run folder")
    raise UserError(f"{path} holds no checkpoint (no state.json in it, nor in checkpoints/best or checkpoints/latest)")


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON file, atomically."""
    write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
