"""Images from anywhere (folders, CSV, arrays, IDX, digits ...) to shards and a manifest.

The way of an image: a `Source` says what there is (sources, tables, arrays), `split` says which split it belongs to,
`work` reads, checks and packs it in a worker process, `writer` cuts the shards, `build` runs it all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distcnn.data.manifest import Manifest


def prepare_digits(output: Path, val_fraction: float = 0.2, seed: int = 0) -> Manifest:
    """Make the data set of scikit-learn's digits in `output` (2 MB, under a second); nothing if it is there already.

    Raises UserError if `output` holds another data set or cannot be written.
    """
    from distcnn.data.prepare.arrays import from_digits
    from distcnn.data.prepare.build import Settings, build

    return build(from_digits(), output, Settings(val_fraction=val_fraction, seed=seed)).manifest
