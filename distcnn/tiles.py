"""What is done alike to a tile wherever it is computed."""

from __future__ import annotations

import dataclasses

import numpy as np

from distcnn.data import keyed
from distcnn.data.loader import Tile, TileRequest


def blank(tile: Tile) -> Tile:
    """One black image of weight 0 in place of no image: a rank with nothing to do in a step still takes part."""
    images = tile.images.new_zeros((1, *tile.images.shape[1:]))
    request = dataclasses.replace(tile.request, ids=np.zeros(1, dtype=np.int64))
    return Tile(request, images, tile.labels.new_zeros(1), tile.weights.new_zeros(1))


def forward_seed(seed: int, request: TileRequest) -> int:
    """The seed of a tile's forward pass (dropout and the like)."""
    key = np.array([keyed.tile_key(request.step, request.lane)])
    return int(keyed.words(key, seed, request.epoch, keyed.FORWARD)[0] >> np.uint64(1))
