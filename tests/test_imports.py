"""Imports run one way, and what few files may do stays in them: read off the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "distcnn"

# A module imports from its own level and those above, never from below.
LEVELS = [
    {"errors", "files", "__init__"},
    {
        "world",
        "config",
        "demands",
        "flags",
        "console",
        "launchers",
        "meeting",
        "site",
        "network",
        "slurm",
        "compiled",
        "numba_kernels",
    },
    {"text", "pictures", "plotting", "page"},
    {"data"},
    {
        "augment",
        "pixels",
        "trivial",
        "memory",
        "kernels",
        "lag",
        "batchnorm",
        "models",
        "fastnets",
        "whitening",
        "losses",
        "optim",
        "muon",
        "ema",
        "tree",
        "state",
        "meter",
        "build",
        "tiles",
        "layers",
        "shapes",
        "gauge",
        "checkpoint",
        "pretrained",
        "tta",
        "distill",
    },
    {"distributed"},
    {
        "metrics",
        "preempt",
        "runfolder",
        "tracking",
        "heartbeat",
        "watchdog",
        "stragglers",
        "times",
        "starts",
        "sessions",
        "outcome",
        "samples",
        "charts",
        "tensorboard",
    },
    {"evaluate", "results", "blackbox", "limits", "start", "job", "train", "replay"},
    {"classifier", "predict", "scoring", "export", "explain"},
    {"plan", "probe", "describe", "tune", "verify", "doctor", "status", "submit", "report"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
PURE = {"data/order.py", "data/keyed.py"}  # numpy alone: the config knows the batch's geometry by them
ALLOWED = {  # what -> the only files that may import or use it
    "torch.distributed": {"distributed.py"},
    "torch._C._distributed_c10d": {"distributed.py"},
    "accelerate": {"distributed.py"},
    "wandb": {"tracking.py"},
    "os.environ": {"world.py"},
    "os.getenv": {"world.py"},
    "os.putenv": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported and of every a.b.c in the code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def is_for_types(tree: ast.AST) -> set[int]:
    """Lines of imports that only a type checker makes."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner.lineno for block in blocks for inner in ast.walk(block) if isinstance(inner, ast.stmt)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    level_of = {module: level for level, modules in enumerate(LEVELS) for module in modules}
    mine = module_of(path)
    assert mine in level_of, f"{mine} has no place in LEVELS yet"
    skipped = is_for_types(tree)
    for line, name in names_in(tree):
        for what, files in ALLOWED.items():
            used = name == what or name.startswith(f"{what}.")
            assert not used or path.relative_to(PACKAGE).as_posix() in files, f"{path}:{line} uses {what}"
        if not name.startswith("distcnn.") or line in skipped:
            continue
        if path == PACKAGE / "__init__.py":  # the public interface: it imports late, inside its functions
            continue
        parts = name.split(".")
        target = parts[1] if parts[1] in level_of else "__init__"
        if f"{'/'.join(parts[1:3])}.py" in PURE:
            continue
        assert level_of[target] <= level_of[mine], f"{path}:{line}: {mine} is above {target}, and imports run one way"


def test_the_walk_sees_what_it_should() -> None:
    code = "if 1:\n    from distcnn.train import train\n    x = os.environ.get('A')\nimport torch.distributed as d"
    assert set(names_in(ast.parse(code))) >= {
        (2, "distcnn.train.train"),
        (3, "os.environ"),
        (4, "torch.distributed"),
    }


def test_no_cycle_within_a_level() -> None:
    """Of modules that may import each other, none does so in a circle at import time."""
    edges: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        name = ".".join(("distcnn", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        edges[name] = {
            target if (PACKAGE.parent / f"{target.replace('.', '/')}.py").exists() else target.rpartition(".")[0]
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("distcnn")
            for target in (f"{node.module}.{alias.name}" for alias in node.names)
        }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())
