"""Some samples of a split as pixels, to be looked at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from distcnn.data.decode import DecodeError, Pixels, decode
from distcnn.data.shards import SplitReader
from distcnn.errors import DataError


def read_pictures(reader: SplitReader, ids: Iterable[int]) -> dict[int, Pixels]:
    """(H, W, 3) uint8 RGB of samples by id. What cannot be read is left out, as is all of a split with remote shards:
    for a few pictures they would be fetched whole.
    """
    found: dict[int, Pixels] = {}
    if reader.remote:
        return found
    for number in sorted(set(ids)):
        try:
            (data,) = reader.read(np.array([number], dtype=np.int64))
            found[number] = decode(data)
        except (DataError, DecodeError, IndexError):
            continue
    return found
