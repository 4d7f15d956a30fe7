"""tutorial.md as a notebook: python docs/notebook.py writes tutorial.ipynb.

A ```bash block becomes a %%bash cell, a ```python block a cell of Python, and what is between them text.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def notebook_of(text: str) -> nbformat.NotebookNode:
    """The cells of a page, in its order. Their ids count, so that the same page gives the same file."""
    cells, end = [], 0
    for block in BLOCK.finditer(text):
        cells.append(new_markdown_cell(text[end : block.start()].strip()))
        language, code = block.groups()
        cells.append(new_code_cell(("%%bash\n" if language == "bash" else "") + code.rstrip("\n")))
        end = block.end()
    cells.append(new_markdown_cell(text[end:].strip()))
    cells = [cell for cell in cells if cell.source]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


if __name__ == "__main__":
    made = notebook_of((HERE / "tutorial.md").read_text(encoding="utf-8"))
    (HERE / "tutorial.ipynb").write_text(nbformat.writes(made) + "\n", encoding="utf-8")
