"""Rows 13 and 21: what cannot be is refused in one line, with exit code 2, and nothing is changed."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from distcnn.errors import EXIT_USAGE
from tests.faults.ranks import Ranks, finish
from tests.faults.runs import flags, state
from tests.support import make_stripes


@pytest.fixture(scope="module")
def begun(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, complete."""
    folder = tmp_path_factory.mktemp("begun")
    assert finish(folder, 1, flags(images, folder / "run", "--epochs", "1")) == [0]
    return folder / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def refused(folder: Path, words: list[str], run: Path, size: int = 1) -> str:
    """The one line that the run is refused with; its folder is as before."""
    before = contents(run)
    with Ranks(folder, size, words) as ranks:
        assert ranks.wait() == [EXIT_USAGE] * size
        (line,) = ranks.err(0).splitlines()
        assert all(ranks.err(rank) == "" for rank in range(1, size))
    after = contents(run)
    assert {name: data for name, data in after.items() if not name.startswith("logs/")} == {
        name: data for name, data in before.items() if not name.startswith("logs/")
    }
    return line


def test_a_changed_config_or_model_is_refused_with_the_difference(images: Path, tmp_path: Path, begun: Path) -> None:
    line = refused(tmp_path, flags(images, begun, "--epochs", "2", "--lr", "0.1"), begun, size=2)
    assert "epochs was 1, now 2, lr was 0.003, now 0.1" in line
    assert "give a new --output, or --resume never to begin anew" in line
    chosen = str(begun / "checkpoints" / "latest")
    other = flags(images, tmp_path / "other", "--epochs", "1", "--resume", chosen, "--channels", "4", "16")
    with Ranks(tmp_path / "b", 1, other) as ranks:
        assert ranks.wait() == [EXIT_USAGE]
        (line,) = ranks.err().splitlines()
    assert "channels was [4, 8], now [4, 16]" in line


@pytest.mark.parametrize(
    ("train", "classes", "said"),
    [
        (80, 5, "images were {'train': 83, 'val': 37}, are now {'train': 80, 'val': 37}"),
        (83, 6, "5 classes were, 6 are now, with '5'"),
        (83, 4, "5 classes were, 4 are now, without '4'"),
    ],
)
def test_changed_data_or_classes_are_refused_with_the_difference(
    tmp_path: Path, begun: Path, train: int, classes: int, said: str
) -> None:
    data = make_stripes(tmp_path / "data", train, 37, classes)
    line = refused(tmp_path / "a", flags(data, begun, "--epochs", "1"), begun)
    assert said in line and f"another data set than {data} (" in line and "--resume never" in line


def test_a_folder_of_something_else_is_refused_and_never_begins_anew(images: Path, tmp_path: Path, begun: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    line = refused(tmp_path / "a", flags(images, tmp_path / "thesis"), tmp_path / "thesis")
    assert "holds files of something else: give another folder" in line
    mine = tmp_path / "mine"
    shutil.copytree(begun, mine, symlinks=True)
    words = flags(images, mine, "--epochs", "1", "--seed", "1", "--resume", "never")
    assert finish(tmp_path / "b", 1, words) == [0]
    assert state(mine / "checkpoints" / "latest")["config"]["seed"] == 1
    assert contents(tmp_path / "mine.old1") == contents(begun)


def test_a_port_in_use_is_one_line(images: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Ranks(tmp_path / "a", 2, flags(images, tmp_path / "run"), port=port) as ranks:
            ranks.processes[0].join(60)
            assert ranks.processes[0].exitcode == EXIT_USAGE
            (line,) = ranks.err(0).splitlines()
            assert f"port {port} is in use by another program or run: give another one (torchrun --master-port" in line
    assert not (tmp_path / "run").exists()
