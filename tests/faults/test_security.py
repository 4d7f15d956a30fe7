"""What a hostile file may try against a run; the rest is in tests/test_security.py, and where README.md here says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distcnn import checkpoint
from distcnn.errors import EXIT_USAGE
from tests.faults.ranks import Ranks
from tests.faults.runs import flags
from tests.support import ROOT
from tests.test_security import Payload, sign


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "run", 1, {"w": torch.ones(1)}, None, {"optimizer": {}, "scaler": {}}, {})


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors"])
def test_a_payload_is_not_run_by_the_command_either(images: Path, tmp_path: Path, saved: Path, name: str) -> None:
    """One line, exit code 2."""
    trace = tmp_path / "trace"
    torch.save({"optimizer": Payload(trace)}, tmp_path / "payload.pt")
    torch.load(tmp_path / "payload.pt", weights_only=False)
    assert trace.exists(), "the payload must work, or this proves nothing"
    trace.rmdir()
    (tmp_path / "payload.pt").replace(saved / name)
    sign(saved)
    words = flags(images, tmp_path / "other", "--resume", str(saved))
    with Ranks(tmp_path / "a", 1, words) as ranks:
        assert ranks.wait() == [EXIT_USAGE]
        (line,) = ranks.err().splitlines()
    assert not trace.exists() and f"checkpoint {saved} was not written by this program" in line


def test_names_of_classes_are_never_markup(tmp_path: Path) -> None:
    """A class called [/] would be an error of the markup, one called [link=...] a link, were it taken for such."""
    code = """
    import sys
    from pathlib import Path
    import numpy as np
    from distcnn.data.prepare.arrays import source_of_arrays
    from distcnn.data.prepare.build import Settings, build
    noise = np.random.default_rng(0)
    names = np.tile(["[/]", "[link=http://x]a", "[bold]b", "<script>"], 6)
    images = noise.integers(0, 255, (2, 24, 8, 8, 3), dtype=np.uint8)
    parts = [("train", images[0], names), ("val", images[1], names)]
    build(source_of_arrays("arrays", "[red]set", parts), Path(sys.argv[1]), Settings())
    """
    lines = "\n".join(line[4:] for line in code.splitlines())
    data, run = tmp_path / "[b]data", tmp_path / "[/i]run"
    subprocess.run([sys.executable, "-c", lines, str(data)], cwd=ROOT, check=True)
    words = [word for word in flags(data, run, "--epochs", "1") if word != "--quiet"]
    with Ranks(tmp_path / "a", 1, words) as ranks:
        assert ranks.wait() == [0]
        assert str(run) in ranks.out() and str(data) in ranks.out()
        assert ranks.err() == "" and "\x1b" not in ranks.out()
