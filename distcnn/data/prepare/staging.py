"""A folder that becomes a data set at once, or stays what it was.

Everything is written into <output>/.prepare first, dataset.json last. To publish it, the shards move up and
dataset.json after them: a folder with a dataset.json is a whole set. What a killed run left, the next one clears.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

from distcnn.data.manifest import MANIFEST_NAME, Manifest, load_manifest, save_manifest
from distcnn.errors import DataError, UserError
from distcnn.files import sync_folder

STAGING = ".prepare"
SHARD_NAME = re.compile(r"(train|val|test)-\d{6}\.(tar|npy)")
_LOCK = "lock"
_OLD = "old.json"  # the dataset.json of the set that is being replaced


class Staging:
    """<output>/.prepare, held by one process at a time, as a context manager; on failure nothing is left behind.

    Raises UserError if `output` cannot be written, is in use by another process, or holds shards of unknown origin.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / STAGING
        self._lock = -1
        self._made: list[Path] = []  # folders that were not there before

    def __enter__(self) -> Staging:
        try:
            self._made = _make_folders(self.folder)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            _hold(self._lock, self.output)
            self._clear_leftovers()
        except OSError as error:
            self._leave()
            raise UserError(f"cannot write to {self.output}: {error.strerror or error}") from error
        self._refuse_strangers()
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._leave()

    def publish(self, manifest: Manifest) -> None:
        """Make the shards in the staging folder the data set of the output folder, in place of one that was there."""
        save_manifest(manifest, self.folder)
        current = self.output / MANIFEST_NAME
        if current.exists():
            current.replace(self.folder / _OLD)
            self._remove(_files_of(self.folder / _OLD))
        for name in _files_of(self.folder / MANIFEST_NAME):
            (self.folder / name).replace(self.output / name)
        sync_folder(self.output)
        (self.folder / MANIFEST_NAME).replace(current)
        sync_folder(self.output)

    def _clear_leftovers(self) -> None:
        """Remove what a killed run left: unfinished shards, and finished ones that it was moving up."""
        if not (self.output / MANIFEST_NAME).exists():
            for staged in (self.folder / MANIFEST_NAME, self.folder / _OLD):
                if staged.exists():
                    self._remove(_files_of(staged))
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _remove(self, names: list[str]) -> None:
        for name in names:
            (self.output / name).unlink(missing_ok=True)

    def _refuse_strangers(self) -> None:
        """Shards that no dataset.json speaks of may be somebody's only copy: they are not overwritten."""
        if (self.output / MANIFEST_NAME).exists():
            return
        for entry in self.output.iterdir():
            if SHARD_NAME.fullmatch(entry.name):
                self.__exit__()
                raise UserError(
                    f"{entry} is there already without a {MANIFEST_NAME}: make one with 'distcnn index',"
                    " or give an empty folder as --output"
                )

    def _leave(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        for folder in reversed(self._made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def existing(output: Path) -> Manifest | None:
    """The whole data set in `output`, or None. Raises UserError if `output` is a file, DataError for a damaged set."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file, not a folder: give another --output")
    return load_manifest(output) if (output / MANIFEST_NAME).exists() else None


def _make_folders(folder: Path) -> list[Path]:
    """Make `folder` and those above it; returns the ones above it that were missing, the outermost first."""
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
    """Indexes and shards that a dataset.json of ours names: plain names only, nothing outside of its folder."""
    try:
        splits = json.loads(manifest.read_text(encoding="utf-8"))["splits"].values()
        names = [str(shard[key]) for split in splits for shard in split["shards"] for key in ("index", "name")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{manifest} is damaged ({error}): remove it, or give another --output") from error
    return [name for name in names if SHARD_NAME.fullmatch(name)]
