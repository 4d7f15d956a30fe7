"""See a data set: tables here, and inspect.html with plots, samples, look-alikes, leaks and advice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Reads every image once, in parallel."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set, or its dataset.json"""
    output: Path | None = None
    """The page to write (default: inspect.html in the folder of the data set)"""
    workers: int = 0
    """Processes; 0 = one a core"""


def run(options: Options) -> int:
    """Look at every image; print tables, write the page."""
    from distcnn.console import Console, rich_console
    from distcnn.data.inspect.advice import advise
    from distcnn.data.inspect.facts import inspect_data_set
    from distcnn.data.inspect.page import page
    from distcnn.data.inspect.pictures import Album
    from distcnn.data.inspect.plots import plots
    from distcnn.data.inspect.tables import print_tables
    from distcnn.data.manifest import MANIFEST_NAME, load_manifest
    from distcnn.errors import UserError
    from distcnn.files import write_atomically

    manifest = load_manifest(options.data)
    root = (options.data.parent if options.data.name == MANIFEST_NAME else options.data).absolute()
    output = options.output or root / "inspect.html"
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give the name of a page, such as {output}/inspect.html")
    facts = inspect_data_set(root, manifest, options.workers, Console(speaks=True))
    advice = advise(facts)
    print_tables(facts, advice, rich_console())
    text = page(facts, advice, plots(facts), Album(root, manifest, facts))
    try:
        write_atomically(output, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; --output names another place") from error
    print(f"{output} written ({len(text) / 1e6:.1f} MB): open it in a browser")
    return 0
