"""A folder that becomes a data set at once, or stays what it was.

Everything is written into <output>/.prepare first, dataset.json last. To publish it, the shards move up, and
dataset.json after them: a folder with a dataset.json is a whole set. What a killed run left is cleared by the next.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from distcnn.data.manifest import MANIFEST_NAME, Manifest, load_manifest, save_manifest
from distcnn.errors import DataError, UserError
from distcnn.files import sync_folder

STAGING = ".prepare"
_LOCK = "lock"


class Staging:
    """<output>/.prepare, held by one process at a time. Use as a context manager; leaves nothing behind on failure."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / STAGING
        self._lock = -1
        self._made: list[Path] = []  # folders that were not there before

    def __enter__(self) -> Staging:
        try:
            self._made = _make_folders(self.folder)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write to {self.output}: {error.strerror or error}") from error
        _hold(self._lock, self.output)
        self._clear_leftovers()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()

    def publish(self, manifest: Manifest) -> None:
        """Make the shards in the staging folder the data set of the output folder, in place of one that was there."""
        save_manifest(manifest, self.folder)
        old = self.output / MANIFEST_NAME
        stale = _files_of(old) if old.exists() else []
        old.unlink(missing_ok=True)
        for name in stale:
            (self.output / name).unlink(missing_ok=True)
        for split in manifest.splits.values():
            for shard in split.shards:
                (self.folder / shard.index).replace(self.output / shard.index)
                (self.folder / shard.name).replace(self.output / shard.name)
        sync_folder(self.output)
        (self.folder / MANIFEST_NAME).replace(old)
        sync_folder(self.output)

    def _clear_leftovers(self) -> None:
        """Remove what a run killed before its end left: unfinished shards, and shards moved without a dataset.json."""
        staged = self.folder / MANIFEST_NAME
        if staged.exists() and not (self.output / MANIFEST_NAME).exists():
            for name in _files_of(staged):
                (self.output / name).unlink(missing_ok=True)
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def existing(output: Path) -> Manifest | None:
    """The whole data set in `output`, or None. Raises UserError if `output` is a file, DataError for a damaged set."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file, not a folder: give another --output")
    return load_manifest(output) if (output / MANIFEST_NAME).exists() else None


def _make_folders(folder: Path) -> list[Path]:
    """Make `folder` and those above it; returns those made, the outermost first, without `folder` itself."""
    missing = []
    above = folder.parent
    while not above.exists():
        missing.append(above)
        above = above.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _hold(lock: int, output: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(
            f"another 'distcnn prepare' is writing to {output}: wait for it, or give another --output"
        ) from error
    except OSError:
        pass  # a file system without locks


def _files_of(manifest: Path) -> list[str]:
    """Shards and indexes that a dataset.json of ours names; plain names only, so nothing outside its folder."""
    try:
        splits = json.loads(manifest.read_text(encoding="utf-8"))["splits"].values()
        names = [str(shard[key]) for split in splits for shard in split["shards"] for key in ("name", "index")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{manifest} is damaged ({error}): remove it, or give another --output") from error
    return [name for name in names if "/" not in name and name not in ("", ".", "..")]
