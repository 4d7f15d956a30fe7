from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from distcnn.files import sha256_of, write_atomically
from tests.support import command, python


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, b"one")
    write_atomically(file, b"")
    assert file.read_bytes() == b"" and names(tmp_path) == ["a.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    contents = {bytes([n]) * 50_000 for n in range(4)}
    write_atomically(file, next(iter(contents)))
    seen: list[bytes] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(file.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=lambda data=data: [write_atomically(file, data) for _ in range(10)])
        for data in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert set(seen) <= contents and names(tmp_path) == ["a"]


# A limit on the size of files stands in for a full disk: the kernel refuses the write in the same way.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from distcnn.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path("a"), b"x" * 2000)
except OSError as error:
    print(error.strerror)
"""


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    done = command(python("-c", FULL_DISK), tmp_path, 60)
    assert done.out == "File too large\n", done.err
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_atomically(tmp_path / "no" / "a", b"")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()
