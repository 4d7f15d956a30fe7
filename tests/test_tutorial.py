"""The tutorial: the notebook is the page, its pictures are there, and every command in it runs as written."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from distcnn.cli import COMMANDS
from tests.support import ROOT, clean_environment

DOCS = ROOT / "docs"
PAGE = (DOCS / "tutorial.md").read_text(encoding="utf-8")
SECONDS = 300  # of one cell, before it is given up


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook() -> nbformat.NotebookNode:
    return nbformat.read(DOCS / "tutorial.ipynb", as_version=4)


def test_the_notebook_is_the_page() -> None:
    """Written anew by `python docs/notebook.py` whenever the page changes."""
    made, found = generator().notebook_of(PAGE), notebook()
    assert found == made
    code = [cell.source.removeprefix("%%bash\n") for cell in found.cells if cell.cell_type == "code"]
    blocks = re.findall(r"^```\w*\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    assert code == blocks and len(code) > 10, "all blocks of the page are commands, and all are in the notebook"
    assert not any(cell.get("outputs") for cell in found.cells), "no outputs of somebody's machine"


def test_what_the_page_names_is_there() -> None:
    pictures = re.findall(r"!\[(.+?)\]\((images/\S+?)\)", PAGE)
    assert len(pictures) >= 5
    for words, name in pictures:
        assert len(words) > 10, "says what it shows"
        assert (DOCS / name).stat().st_size < 150_000
        with Image.open(DOCS / name) as image:
            assert image.format == "PNG" and 500 < image.width < 1200
    assert {path.name for path in (DOCS / "images").iterdir()} >= {Path(name).name for _, name in pictures}
    named = set(re.findall(r"\bdistcnn ([a-z][\w-]+)", PAGE))
    assert named and named <= set(COMMANDS)


@pytest.mark.filterwarnings("default")  # of the notebook's own machinery
def test_it_runs_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, as a reader would; a command that fails ends it."""
    environment = clean_environment(
        PATH=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", HOME=str(tmp_path)
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    work.mkdir()
    made = notebook()
    NotebookClient(made, timeout=SECONDS, resources={"metadata": {"path": str(work)}}).execute()
    said = "".join(output.get("text", "") for cell in made.cells for output in cell.get("outputs", []))
    assert "same weights: True" in said, said
    share = re.search(r"right: ([\d.]+)%", said)
    assert share and float(share[1]) > 93, said
    assert "#SBATCH --nodes=2" in said and "hidden  flatten + linear" in said
    assert "\x1b[2K" not in said, "no live bars in a notebook"
    for name in (
        "explain.png",
        "tune-lr.png",
        "submission.csv",
        "runs/numbers/report.html",
        "data/numbers/inspect.html",
    ):
        assert (work / name).stat().st_size > 1000, name
    assert len((work / "submission.csv").read_text().splitlines()) == 300
