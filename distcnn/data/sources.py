"""Where shards lie: patterns to names, names to open files. Local paths, and URLs by fsspec.

A pattern is a path or URL with braces (`train-{0000..0123}.tar`, `{a,b}.tar`) and globs (`*`, `?`, `[...]`); several
are joined with `::`. The order of the shards, and so the ids of the samples, is the order written for braces and the
sorted order for globs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from distcnn.data.tar import ReadAt, file_reader
from distcnn.errors import DataError, UserError

SCHEMES = ("s3", "gs", "gcs", "hf", "az", "abfs", "http", "https", "memory")
MAX_SHARDS = 1_000_000
REMOTE_READ_AHEAD = 8 << 20  # a request costs as much time as some megabytes
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://)?")
_GLOB = re.compile(r"[*?\[]")


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL."""
    return "://" in name


def expand(pattern: str) -> list[str]:
    """The shards that `pattern` names: absolute paths and URLs, in the order of the ids, none twice.

    Raises DataError where nothing matches, or a shard is named twice; UserError for forms that are refused.
    """
    names: list[str] = []
    for part in pattern.split("::"):
        _refuse_commands(part)
        for word in _expand_braces(part):
            word = word.removeprefix("file://")
            names.extend(_match(word) if _GLOB.search(word) else [word if is_remote(word) else str(_absolute(word))])
            if len(names) > MAX_SHARDS:
                raise DataError(f"{pattern!r} names more than {MAX_SHARDS} shards")
    refuse_repeated(names)
    return names


def refuse_repeated(names: list[str]) -> None:
    """Raises DataError for a shard that is named twice: its samples would count twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"shard {name} is named twice")
        seen.add(name)


@contextmanager
def open_shard(name: str) -> Iterator[tuple[ReadAt, int]]:
    """(`read(offset, length)`, bytes in all) of a local or remote shard. Raises DataError naming it.

    A remote shard is read by ranges of some megabytes; from a server that cannot serve ranges it is copied first.
    """
    if not is_remote(name):
        with _naming(f"shard {name}"), Path(name).open("rb", buffering=0) as local:
            size = local.seek(0, 2)
            yield file_reader(local, size), size
        return
    with _naming(f"shard {name}"):
        opened = open_remote(name)
    with opened as file:
        if not _serves_ranges(file):
            with TemporaryDirectory(prefix="distcnn-") as folder:
                copy = copy_of(name, Path(folder))
                with open_shard(str(copy)) as found:
                    yield found
            return
        size = file.seek(0, 2)
        read = file_reader(file, size, REMOTE_READ_AHEAD, REMOTE_READ_AHEAD)

        def guarded(offset: int, length: int) -> bytes:
            with _naming(f"shard {name}"):
                return read(offset, length)

        yield guarded, size


def _serves_ranges(file: IO[bytes]) -> bool:
    """Whether a remote file can be read from the middle: some HTTP servers send all of a file or nothing."""
    if not file.seekable():
        return False
    try:
        file.seek(1)
        file.read(1)
    except ValueError:
        return False
    return True


def copy_of(name: str, folder: Path) -> Path:
    """A copy of a remote shard in `folder`. Raises DataError naming it."""
    path = folder / re.sub(r"[^A-Za-z0-9.-]", "_", name)[-128:]
    with _naming(f"shard {name}"), open_remote(name, from_start_to_end=True) as source, path.open("wb") as target:
        while block := source.read(REMOTE_READ_AHEAD):
            target.write(block)
    return path


def read_small(name: str, limit: int) -> bytes:
    """The bytes of a small local or remote file. Raises DataError if it is missing or larger than `limit` bytes."""
    with _naming(name), open_remote(name) if is_remote(name) else Path(name).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{name} is larger than {limit} bytes")
    return data


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """What goes wrong with a file or a server inside becomes a DataError that names it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, FileNotFoundError | None):
            raise DataError(f"{what} is missing") from error
        raise DataError(f"cannot read {what}: {_reason(error.__cause__)}") from error  # fsspec calls all of them so
    except OSError as error:
        raise DataError(f"cannot read {what}: {_reason(error)}") from error
    except Exception as error:
        if "://" not in what:
            raise
        raise DataError(f"cannot read {what}: {_reason(error)}") from error  # HTTP clients have errors of their own


def _refuse_commands(part: str) -> None:
    """A pattern is never given to a shell; what looks like a command is refused, and so is a scheme not listed."""
    if not part.strip():
        raise UserError("an empty pattern: name shards, for example '/data/train-{0000..0123}.tar'")
    if part.lstrip().startswith(("|", "!")) or part.rstrip().endswith("|") or part.lower().startswith("pipe:"):
        raise UserError(f"{part!r} is a command: shards are read as files or URLs, commands are refused")
    found = _SCHEME.match(part)
    if found and (is_remote(part) or found.group(0) != "file:"):
        scheme = found.group(1).lower()
        if scheme not in (*SCHEMES, "file") and (is_remote(part) or not Path(part).exists()):
            raise UserError(f"{part!r}: {scheme}: is refused; a path, or one of {', '.join(SCHEMES)}://")


def _expand_braces(word: str) -> Iterator[str]:
    """'a{0..1}{x,y}' -> a0x a0y a1x a1y; the width of zeros is kept, ranges may run down. Braces do not nest."""
    pieces = _BRACES.split(word)  # text, inside, text, inside, ..., text
    choices = [_choices(inside) for inside in pieces[1::2]]
    if any("{" in text or "}" in text for text in pieces[::2]):
        raise UserError(f"{word!r}: braces that do not pair or that nest")
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise DataError(f"{word!r} names more than {MAX_SHARDS} shards")
    for chosen in product(*choices):
        yield pieces[0] + "".join(a + b for a, b in zip(chosen, pieces[2::2], strict=True))


def _choices(inside: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if not found:
        return inside.split(",")
    first, last = found.groups()
    low, high = int(first), int(last)
    if abs(high - low) >= MAX_SHARDS:
        raise DataError(f"'{{{inside}}}' names more than {MAX_SHARDS} shards")
    width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
    return [f"{number:0{width}d}" for number in range(low, high + (1 if low <= high else -1), 1 if low <= high else -1)]


def _match(word: str) -> list[str]:
    """The files that a glob matches, sorted."""
    if is_remote(word):
        system, path = _file_system(word)
        with _naming(word):
            found = sorted(str(system.unstrip_protocol(name)).replace(":///", "://") for name in system.glob(path))
    else:
        pattern = _absolute(word)
        if pattern.exists():  # a file with brackets in its name
            return [str(pattern)]
        found = sorted(map(str, Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))))
    if not found:
        raise DataError(f"no shard matches {word}")
    return found


def _absolute(word: str) -> Path:
    """The path without '..', symbolic links kept: a store of links has names that say more than their targets'."""
    return Path(os.path.normpath(Path(word).expanduser().absolute()))


def open_remote(name: str, from_start_to_end: bool = False) -> IO[bytes]:
    """A remote file, without a cache of its own. Raises UserError, DataError, or what the protocol's client raises."""
    system, path = _file_system(name)
    streamed = {"block_size": 0} if from_start_to_end and name.startswith("http") else {}
    opened: IO[bytes] = system.open(path, "rb", cache_type="none", **streamed)
    return opened


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec.core

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        what = f"{url.split('://')[0]}:// needs one more package ({_reason(error)})"
        raise UserError(f"{what}: pip install 'distcnn[remote]'") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {url}: {_reason(error)}") from error
    return system, str(path)


def _reason(error: BaseException) -> str:
    """One line of an exception's text."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
