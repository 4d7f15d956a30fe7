"""A remote shard to a file, through servers that drop connections, answer 503 or send too little."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from distcnn.data.manifest import Shard
from distcnn.data.sources import open_remote
from distcnn.errors import DataError, UserError

BLOCK_BYTES = 8 << 20
TRIES = 7  # without a byte of progress
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 20.0


class Interrupted(OSError):
    """Less came than was announced."""


def fetch(shard: Shard, target: Path, pause: Callable[[float], None] = time.sleep) -> None:
    """Write a remote shard to `target` and check its size, and its sha256 where dataset.json has it.

    What arrived before an error stays; the rest is asked for again, after pauses that double, until `TRIES` requests in
    a row have brought nothing. Raises DataError naming the shard, with `target` removed.
    """
    try:
        with target.open("wb", buffering=0) as file:
            _download(shard, file, pause)
        _check(shard, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _download(shard: Shard, file: IO[bytes], pause: Callable[[float], None]) -> None:
    failures, streamed = 0, False
    while file.tell() < shard.bytes:
        before = file.tell()
        try:
            _append(shard, file, streamed)
            continue
        except UserError:
            raise  # the scheme's package is missing, or the disk is full: trying again does not help
        except ValueError as error:  # what fsspec raises for a server that sends all of a file or nothing
            if not streamed:
                streamed = True
                continue
            reason: BaseException = error
        except FileNotFoundError as error:
            reason = error.__cause__ or error  # fsspec calls every failure to ask for a file's size so
        except Exception as error:  # each protocol has errors of its own
            reason = error
        if isinstance(reason, FileNotFoundError) or getattr(reason, "status", 0) in (404, 410):
            raise DataError(f"shard {shard.name} is missing") from reason
        failures = 1 if file.tell() > before else failures + 1
        if failures >= TRIES:
            text = " ".join(str(reason).split())[:200] or type(reason).__name__
            raise DataError(f"shard {shard.name} could not be fetched in {TRIES} tries: {text}") from reason
        pause(min(FIRST_PAUSE_SECONDS * 2 ** (failures - 1), LONGEST_PAUSE_SECONDS))


def _append(shard: Shard, file: IO[bytes], streamed: bool) -> None:
    """Read on from where `file` ends; with `streamed` from the beginning, into the beginning."""
    with open_remote(shard.name, from_start_to_end=streamed) as source:
        if streamed:
            file.seek(0)
            file.truncate()
        while (position := file.tell()) < shard.bytes:
            if not streamed:
                source.seek(position)
            block = source.read(min(BLOCK_BYTES, shard.bytes - position))
            if not block:
                raise Interrupted(f"ended after {position} of {shard.bytes} bytes")
            _write(shard, file, block)
        if streamed and source.read(1):
            raise DataError(f"shard {shard.name} is larger than the {shard.bytes} bytes that dataset.json says")


def _write(shard: Shard, file: IO[bytes], block: bytes) -> None:
    """Raises DataError: a full disk here is not a fault of the server."""
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise DataError(f"shard {shard.name} cannot be kept in {file.name}: {error.strerror or error}") from error


def _check(shard: Shard, path: Path) -> None:
    if not shard.sha256:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise DataError(
            f"shard {shard.name} is not the one that was indexed (sha256 {found[:12]}..., dataset.json has"
            f" {shard.sha256[:12]}...): it was changed since, or damaged on the way; index the set again"
        )
