from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distcnn import __version__
from distcnn.cli import COMMANDS, main
from tests.support import ROOT, command, python

HEAVY = ("torch", "torchvision", "accelerate", "sklearn", "matplotlib", "wandb", "webdataset", "pandas", "scipy")


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        ([], 2, "usage: distcnn COMMAND [flags]", ""),
        (["--help"], 0, "Begin with: distcnn train", ""),
        (["--version"], 0, f"distcnn {__version__}", ""),
        (
            ["trian"],
            2,
            "",
            "distcnn trian: error: no command 'trian'; did you mean 'train'? (distcnn --help lists them)\n",
        ),
        (["../x"], 2, "", "distcnn ../x: error: no command '../x'; valid: "),
        (["train", "--epochs", "0"], 2, "", "distcnn train: error: --epochs 0: must be >= 1\n"),
    ],
)
def test_what_is_said(argv: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    said = capsys.readouterr()
    assert out in said.out and said.err.startswith(err) and said.err.count("\n") == bool(err)


def test_every_command_is_there_and_documented() -> None:
    import importlib

    for name in COMMANDS:
        module = importlib.import_module(f"distcnn.commands.{name.replace('-', '_')}")
        assert module.__doc__ and callable(module.run) and (hasattr(module, "Options") or callable(module.parse))


HELP_OF_ALL = f"""
import sys, time
from distcnn.cli import COMMANDS, main
for name in COMMANDS:
    begun = time.perf_counter()
    try:
        main([name, "--help"])
    except SystemExit as leaving:
        assert leaving.code in (0, None), leaving.code
    loaded = sorted(set({HEAVY!r}) & set(sys.modules))
    print(f"TOOK {{name}} {{time.perf_counter() - begun:.2f}} {{loaded}}", file=sys.stderr)
    if loaded:
        break
"""


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    done = command(python("-c", HELP_OF_ALL), tmp_path, 60)
    took = [line.split(maxsplit=3) for line in done.err.splitlines() if line.startswith("TOOK")]
    assert done.code == 0 and [name for _, name, _, _ in took] == list(COMMANDS), done.err
    for _, name, seconds, loaded in took:
        assert loaded == "[]", f"distcnn {name} --help imports {loaded}"
        assert float(seconds) < 3, "about 0.3 s on an idle machine"


BAD_FLAG = f"""
import sys
from distcnn.cli import main
code = main(["train", *sys.argv[1:]])
assert not set({HEAVY!r}) & set(sys.modules), "a bad flag is found before torch is imported"
sys.exit(code)
"""


def test_a_bad_config_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("optimiser = 'sgd'\n")
    done = command(python("-c", BAD_FLAG, "--config", "recipe.toml"), tmp_path, 60)
    assert done.code == 2 and done.out == ""
    assert done.err == "distcnn train: error: recipe.toml: no setting 'optimiser'; did you mean 'optimizer'?\n"


@pytest.mark.parametrize("words", [("train.py",), ("-m", "distcnn", "train")])
def test_exit_code_of_the_programs(words: tuple[str, ...], tmp_path: Path) -> None:
    first = str(ROOT / words[0]) if words[0].endswith(".py") else words[0]
    done = command([sys.executable, first, *words[1:], "--lr", "0"], tmp_path)
    assert (done.code, done.out, done.err) == (2, "", "distcnn train: error: --lr 0.0: must be positive\n")
