"""See why a network gives an image its class: what it sees, its first filters, feature maps, and Grad-CAM.

distcnn explain runs/x photo.jpg                      a picture, explain.png, and the most probable classes
distcnn explain runs/x photo.jpg --class tulip        what would speak for another class
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Which network, which image, and what is asked of them."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint or run folder."""
    image: tyro.conf.Positional[Path]
    """An image file."""
    output: Path = Path("explain.png")
    """The picture that is written."""
    wanted: Annotated[str, tyro.conf.arg(name="class")] = ""
    """Class that Grad-CAM speaks for. Empty: the most probable one."""
    layer: str = ""
    """Layer that it takes. Empty: the last whose maps are at least 4x4."""
    ema: bool = True
    """Use the averaged weights where there are any."""


def run(options: Options) -> int:
    """Write the picture and print the most probable classes; 0."""
    from distcnn.classifier import load_model
    from distcnn.errors import UserError
    from distcnn.explain.look import look
    from distcnn.explain.picture import picture
    from distcnn.files import write_atomically

    if not options.image.is_file():
        raise UserError(f"no image file {options.image}")
    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")
    if options.output.suffix.lower() != ".png":
        raise UserError(f"--output {options.output}: the picture is a .png")
    found = look(load_model(options.checkpoint, options.ema), options.image, options.wanted, options.layer)
    write_atomically(options.output, picture(found))
    for name, probability in found.top:
        print(f"{100 * probability:6.2f} %  {name}")
    print(f"{options.output} written: what speaks for {found.wanted!r} in {found.layer}")
    return 0
