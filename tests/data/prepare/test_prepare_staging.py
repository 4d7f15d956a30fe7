from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepare_files import bytes_of, class_folders, made, processes_of, wait_for, write

from distcnn.data.manifest import MANIFEST_NAME, load_manifest
from distcnn.data.prepare.build import Settings, build
from distcnn.data.prepare.folders import from_folder
from distcnn.data.prepare.images import Policy
from distcnn.data.prepare.staging import STAGING, Staging
from distcnn.data.prepare.writer import Limits
from distcnn.errors import UserError


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "in", {"ant": 30, "bee": 20, "cat": 10})


def test_an_output_that_is_a_file_or_lies_in_one_is_refused(folders: Path, tmp_path: Path) -> None:
    write(tmp_path / "file", "x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        made(from_folder(folders), tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .*file/out"):
        made(from_folder(folders), tmp_path / "file" / "out")


def test_an_output_that_cannot_be_written_is_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to /proc/none: "):
        made(from_folder(folders), Path("/proc/none"))


def test_shards_of_unknown_origin_are_not_overwritten(folders: Path, tmp_path: Path) -> None:
    write(tmp_path / "out" / "train-000003.tar", "somebody's")
    with pytest.raises(UserError, match=r"train-000003.tar is there already without a dataset.json"):
        made(from_folder(folders), tmp_path / "out")
    assert bytes_of(tmp_path / "out") == {"train-000003.tar": b"somebody's"}


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_behind(folders: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; nothing of it was kept"):
            made(from_folder(folders), disk / "out")
        assert list(disk.iterdir()) == []


def test_a_quota_leaves_the_old_set_as_it_was(folders: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes writes fail for any user, with EFBIG."""
    out = tmp_path / "out"
    made(from_folder(folders), out, seed=3)
    before = bytes_of(out)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-m", "distcnn", "prepare", "folder", str(folders), "--output", str(out), "--overwrite"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"distcnn prepare: error: cannot write to .*: File too large; nothing of it was kept\n", done.stderr
    )
    assert bytes_of(out) == before


def start(folders: Path, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distcnn", "prepare", "folder", str(folders), "--output", str(out), *flags]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a script starts with '&'
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_half_way_is_not_taken_for_a_set_and_can_be_repeated(tmp_path: Path, how: int) -> None:
    folders = class_folders(tmp_path / "in", {"a": 1000, "b": 1000}, width=200, height=200)  # seconds of work
    out = tmp_path / "out"
    flags = ("--workers", "2", "--shard-samples", "50", "--max-side", "7", "--format", "webp", "--val-fraction", "0.2")
    run = start(folders, out, *flags)
    wait_for(lambda: len(list((out / STAGING).glob("*.tar"))) >= 3)
    os.kill(run.pid, how)
    run.communicate(timeout=30)
    assert run.returncode == (-how if how == signal.SIGKILL else 130), "perhaps it had ended before"
    assert not (out / MANIFEST_NAME).exists()
    assert not list(out.glob("*.tar"))
    if how == signal.SIGINT:
        assert not out.exists()
    wait_for(lambda: not processes_of(run.pid))  # the workers ended with their parent
    again = start(folders, out, *flags)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert sum(split.samples for split in load_manifest(out).splits.values()) == 2000
    build(
        from_folder(folders),
        tmp_path / "undisturbed",
        Settings(0.2, limits=Limits(50), policy=Policy("webp", 7), workers=1),
    )
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_moment_of_publishing_leaves_a_whole_set_or_none(
    folders: Path, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename and unlink of publish() in turn is the last one that happens."""
    source, settings = from_folder(folders), {"limits": Limits(samples=30)}
    made(source, tmp_path / "new", **settings)
    made(source, tmp_path / "old", seed=9, limits=Limits(samples=20))
    new, old = bytes_of(tmp_path / "new"), bytes_of(tmp_path / "old")
    steps = 0
    while True:
        out = tmp_path / f"out{steps}"
        if overwrite:
            made(source, out, seed=9, limits=Limits(samples=20))
        pid = os.fork()
        if pid == 0:  # the child dies at its step-th change of the file system within publish()
            _die_after(steps)
            with contextlib.suppress(BaseException):
                build(source, out, Settings(workers=1, **settings), overwrite=True)
            os._exit(0)
        killed = os.waitpid(pid, 0)[1] != 0
        if (out / MANIFEST_NAME).exists():
            held = {name: data for name, data in bytes_of(out).items() if not name.startswith(STAGING)}
            assert held == (old if held[MANIFEST_NAME] == old[MANIFEST_NAME] else new)
        build(source, out, Settings(workers=1, **settings), overwrite=True)
        assert bytes_of(out) == new
        if not killed:
            break
        steps += 1
    assert steps > 5


def _die_after(steps: int) -> None:
    left = [steps]
    publish = Staging.publish

    def counted(kind: str):  # type: ignore[no-untyped-def]
        original = getattr(Path, kind)

        def change(self: Path, *args: object, **options: object) -> object:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return original(self, *args, **options)

        return change

    def dying(self: Staging, manifest: object) -> None:
        Path.replace, Path.unlink = counted("replace"), counted("unlink")  # type: ignore[method-assign]
        publish(self, manifest)  # type: ignore[arg-type]

    Staging.publish = dying  # type: ignore[assignment,method-assign]


def test_two_at_once_do_not_mix(folders: Path, tmp_path: Path) -> None:
    with Staging(tmp_path / "out"), pytest.raises(UserError, match="another 'distcnn prepare' is writing to"):
        made(from_folder(folders), tmp_path / "out")
    assert made(from_folder(folders), tmp_path / "out").made
