"""Shards of a remote set on this node's disk, whole, fetched once for all processes of the node.

Everything is said with files, so that processes that know nothing of each other share the cache and a killed one leaves
nothing behind that matters:

* `<key>.tar` is a whole shard: it is renamed to that name when it has arrived and been checked;
* a process that reads a shard holds a shared lock on the file: such a shard is not evicted;
* `<key>.lock` is locked by the process that fetches the shard; the others wait for it, and then find the file;
* `<key>.<bytes>.part` is a shard under way: it counts as if it were whole already;
* `<process>.plan` is locked as long as its process lives and says when it will need which shard: evicted is what all
  of them need last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from distcnn.data.fetch import fetch
from distcnn.data.manifest import Shard
from distcnn.errors import UserError

NEVER = 1 << 62  # a step that does not come: nobody has said that the shard is needed again
DEFAULT_SHARE = 0.8  # of the disk's free space
SUFFIX = ".tar"


def default_folder() -> Path:
    """Below the temporary folder, which is a local disk on most clusters ($TMPDIR)."""
    return Path(tempfile.gettempdir()) / f"distcnn-shards-{os.getuid()}"


class NodeCache:
    """The shards of remote sets in `folder`, at most `limit_bytes` of them (0 = 80 % of the free space).

    Shards in use are never evicted, so the limit can be passed where it is smaller than what is in use at once.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = 0) -> None:
        self.folder = folder or default_folder()
        _make_private(self.folder)
        free = shutil.disk_usage(self.folder).free
        self.limit_bytes = limit_bytes or int(DEFAULT_SHARE * (free + sum(self._sizes().values())))
        self.fetched = 0
        self._mutex = threading.Lock()
        self._needs: dict[str, int] = {}
        self._plan_path = self.folder / f"{os.getpid()}-{id(self):x}.plan"
        self._plan = os.open(self._plan_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._plan, fcntl.LOCK_EX)

    def close(self) -> None:
        """Withdraw what this process said it needs. Shards stay for the next run."""
        if self._plan >= 0:
            self._plan_path.unlink(missing_ok=True)
            os.close(self._plan)
            self._plan = -1

    def open(self, shard: Shard) -> int:
        """A file descriptor of the shard, fetched if it is not here; it keeps the shard from eviction until closed.

        Raises DataError naming the shard.
        """
        path = self._path(shard)
        while True:
            descriptor = _open_shared(path)
            if descriptor is not None:
                if os.fstat(descriptor).st_size == shard.bytes:
                    return descriptor
                os.close(descriptor)  # damaged: it is fetched anew
                path.unlink(missing_ok=True)
            self._fetch(shard, needed_now=True)

    def fetch_ahead(self, shard: Shard) -> bool:
        """Fetch a shard, if it fits without evicting one that is in use or needed sooner; whether it is here now.

        Raises DataError naming the shard.
        """
        return self._path(shard).exists() or self._fetch(shard, needed_now=False)

    def has(self, shard: Shard) -> bool:
        """Whether the shard is here now."""
        return self._path(shard).exists()

    def need(self, steps: Mapping[Shard, int]) -> None:
        """Say at which step from now this process needs shards next; what is not named, never."""
        needs = {self._path(shard).name: step for shard, step in steps.items()}
        with self._mutex:
            if needs != self._needs:
                self._needs = needs
                data = json.dumps(needs).encode()
                os.pwrite(self._plan, data, 0)
                os.ftruncate(self._plan, len(data))

    def _path(self, shard: Shard) -> Path:
        facts = f"{shard.name}\n{shard.bytes}\n{shard.sha256}"
        return self.folder / f"{hashlib.sha256(facts.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}{SUFFIX}"

    def _fetch(self, shard: Shard, needed_now: bool) -> bool:
        """Fetch the shard, or wait for whoever does. False: there is no room, and it is not needed now."""
        path = self._path(shard)
        partial = path.with_suffix(f".{shard.bytes}.part")
        with _locked(path.with_suffix(".lock")):
            if path.exists():
                return True
            with _locked(self.folder / "evict.lock"):
                if not self._make_room(path.name, shard.bytes, needed_now):
                    return False
                partial.touch(mode=0o600)
            fetch(shard, partial)
            partial.replace(path)
            self.fetched += 1
            return True

    def _make_room(self, name: str, wanted_bytes: int, needed_now: bool) -> bool:
        """Remove what nobody has open, needed last first; without `needed_now` only what is needed after `name`."""
        sizes, needs = self._sizes(), self._all_needs()
        excess = sum(sizes.values()) + self._bytes_under_way() + wanted_bytes - self.limit_bytes
        mine = needs.get(name, NEVER)
        victims = sorted(sizes, key=lambda other: (-needs.get(other, NEVER), other))
        if not needed_now:
            victims = [other for other in victims if needs.get(other, NEVER) > mine]
            if excess > sum(sizes[other] for other in victims):
                return False
        for other in victims:
            if excess <= 0:
                break
            if _remove_unused(self.folder / other):
                excess -= sizes[other]
        return needed_now or excess <= 0

    def _bytes_under_way(self) -> int:
        """Bytes that the shards being fetched will have. What a killed process left of one is removed."""
        total = 0
        for path in self.folder.glob("*.part"):
            key, size, _ = path.name.split(".")
            with _locked(self.folder / f"{key}.lock", wait=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                else:
                    total += int(size)
        return total

    def _sizes(self) -> dict[str, int]:
        """Bytes of each shard that is here, by file name."""
        sizes = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                sizes[path.name] = path.stat().st_size
        return sizes

    def _all_needs(self) -> dict[str, int]:
        """The first step from now at which any process of the node needs a shard, by file name."""
        needs: dict[str, int] = {}
        for path in self.folder.glob("*.plan"):
            for name, step in _read_plan(path, path == self._plan_path).items():
                needs[name] = min(step, needs.get(name, NEVER))
        return needs


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that a file stands for. With `wait=False` it says whether it could be had."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _make_private(folder: Path) -> None:
    """Make the folder for this user alone. Raises UserError if it belongs to another: its shards could be anything."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.lstat().st_uid
        usable = folder.is_dir() and not folder.is_symlink() and os.access(folder, os.W_OK)
    except OSError as error:
        raise UserError(
            f"no cache of remote shards in {folder}: {error.strerror}; set TMPDIR to a local disk"
        ) from error
    if owner != os.getuid() or not usable:
        raise UserError(f"the cache of remote shards {folder} is not a folder of yours: set TMPDIR to a local disk")


def _open_shared(path: Path) -> int | None:
    """A descriptor with a shared lock, or None if the file is not there, or was removed before it was locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def _remove_unused(path: Path) -> bool:
    """Remove a file that no process holds open; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _read_plan(path: Path, own: bool) -> dict[str, int]:
    """What a living process needs; the file of a dead one is removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    try:
        if not own:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)  # nobody holds it: its process has ended
                return {}
            except BlockingIOError:
                pass
        found = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0) or b"{}")
        return found if isinstance(found, dict) else {}
    except ValueError:  # being written just now
        return {}
    finally:
        os.close(descriptor)
