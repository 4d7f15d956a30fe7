from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distcnn.cli import main
from distcnn.data.manifest import load_manifest


def jpg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def folders(root: Path, count: int = 20) -> Path:
    for number, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(jpg(100 * number + i))
    return root


HELP = """
import sys
from distcnn.cli import main
try:
    main(["prepare", "csv", "--help"])
finally:
    print(sorted({"torch", "numpy", "PIL", "sklearn"} & set(sys.modules)))
"""


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--images", "--image-column", "--label-column", "--group-column", "--test-csv", "--exif", "--max-bad"):
        assert flag in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("source", ["folder", "csv", "arrays", "idx", "digits", "torchvision", "parquet"])
def test_every_source_has_help(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["prepare", source, "--help"])
    assert left.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_a_folder_is_prepared_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders(tmp_path / "in") / "ant" / "bad.jpg").write_bytes(b"text")
    out = tmp_path / "out"
    words = [
        "prepare",
        "folder",
        str(tmp_path / "in"),
        "--output",
        str(out),
        "--val-fraction",
        "0.25",
        "--workers",
        "1",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "in: 2 classes" in text
    assert "left out: ant/bad.jpg: not an image" in text
    assert f"next: distcnn inspect {out}" in text
    assert f"distcnn train --data {out}" in text
    rows = [line.split() for line in text.splitlines() if "│" in line]
    assert [row[1::2][:3] for row in rows] == [["train", "30", "1"], ["val", "10", "1"]]
    assert main(words) == 0
    assert "this very data set is there already" in capsys.readouterr().out


def test_a_csv_with_a_test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path / "in")
    (tmp_path / "t.csv").write_text(
        "file,kind\n" + "".join(f"{c}/{i},{c}\n" for c in ("ant", "bee") for i in range(18))
    )
    (tmp_path / "q.csv").write_text("file\nant/19\nbee/19\n")
    words = [
        "prepare",
        "csv",
        str(tmp_path / "t.csv"),
        "--images",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
    ]
    flags = [
        "--image-column",
        "file",
        "--label-column",
        "kind",
        "--test-csv",
        str(tmp_path / "q.csv"),
        "--max-side",
        "6",
    ]
    assert main(words + flags) == 0
    text = capsys.readouterr().out
    assert "test (no labels)" in text
    assert "warning: 2 images in" in text
    manifest = load_manifest(tmp_path / "out")
    assert manifest.image.max_width == 6
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 32, "val": 4, "test": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "folder"),
        (["folder", "{tmp}/none", "--output", "{tmp}/out"], "none is not a folder"),
        (["folder", "{tmp}/in", "--output", "{tmp}/out", "--val-fraction", "1.5"], "--val-fraction 1.5"),
        (["folder", "{tmp}/in", "--output", "{tmp}/out", "--val-fraction", "nan"], "--val-fraction nan"),
        (["folder", "{tmp}/in", "--output", "{tmp}/out", "--max-side", "many"], "max-side"),
        (["folder", "{tmp}/in", "--output", "{tmp}/out", "--format", "gif"], "format"),
        (["folder", "{tmp}/in"], "output"),
        (["folders", "{tmp}/in", "--output", "{tmp}/out"], "folder"),
        (["folder", "{tmp}/in", "--output", "{tmp}/in/ant/0.jpg"], "is a file"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders(tmp_path / "in")
    assert main(["prepare", *(word.format(tmp=tmp_path) for word in words)]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.startswith("distcnn prepare: error: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_terminal_sees_a_bar_and_a_pipe_sees_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from distcnn.data.prepare import display

    for terminal in (True, False):
        out = io.StringIO()
        monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
        with display.Display(Console(file=out, force_terminal=terminal, width=120)) as shown:
            for done in (1, 30, 60):
                shown.report("train", done, 60)
            shown.report("val", 5, 5)
        text = out.getvalue()
        assert "train" in text
        assert "images/s" in text
        assert ("\x1b[" in text) is terminal
        if not terminal:
            assert [line.split(",")[0] for line in text.splitlines()] == [
                "train: 1 of 60 images",
                "train: 30 of 60 images",
                "train: 60 of 60 images",
                "val: 5 of 5 images",
            ]
