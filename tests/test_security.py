"""What a hostile file may try. Where the rest of the list is tried: faults/README.md."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from distcnn import checkpoint
from distcnn.cli import main
from distcnn.errors import EXIT_USAGE, UserError
from distcnn.files import sha256_of


class Payload:
    """What a hostile pickle does: here it makes a folder, to be seen."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.trace,)


def sign(path: Path) -> None:
    """Write the manifest that fits the files: checksums show damage, not who wrote them."""
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in path.iterdir() if f.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"version": 1, "step": 1, "files": files}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "run", 1, {"w": torch.ones(1)}, None, {"optimizer": {}, "scaler": {}}, {})


def test_a_zip_bomb_is_not_unpacked(saved: Path) -> None:
    """100 MB of zeros in 100 kB: torch would unpack what is compressed."""
    torch.save({"optimizer": torch.zeros(25_000_000)}, saved / "trainer.pt")
    with zipfile.ZipFile(saved / "trainer.pt") as stored:
        parts = {entry.filename: stored.read(entry) for entry in stored.infolist()}
    with zipfile.ZipFile(saved / "trainer.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in parts.items():
            bomb.writestr(name, data)
    assert (saved / "trainer.pt").stat().st_size < 200_000
    sign(saved)
    with pytest.raises(UserError, match=r"trainer\.pt is compressed, as torch never writes it"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_json_too_deep_is_refused_in_one_line(saved: Path, name: str) -> None:
    (saved / name).write_text("[" * 100_000 + "]" * 100_000)
    if name != "manifest.json":
        sign(saved)
    with pytest.raises(UserError) as caught:
        checkpoint.load(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_a_box_of_a_stranger_runs_nothing(tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, box = tmp_path / "trace", tmp_path / "box"
    box.mkdir()
    torch.save({"w": Payload(trace)}, box / "model.safetensors")
    (box / "config.toml").write_text(f"data = {str(tmp_path)!r}")
    for text in ("[" * 100_000, "[]", "{}", '{"version": 9}', '{"version": 1}'):
        (box / "box.json").write_text(text)
        assert main(["replay", str(box)]) == EXIT_USAGE
        assert capsys.readouterr().err.startswith(f"distcnn replay: error: {box / 'box.json'} ")
    assert not trace.exists()
