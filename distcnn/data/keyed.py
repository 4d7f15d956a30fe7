"""Random draws that are a function of their key, not of when or where they are made. numpy only.

A draw is a hash of (seed, epoch, sample id, operation): the mixing function of SplitMix64 (Steele, Lea & Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) applied once per part of the key. The same sample gets
the same crop in any process, any thread and any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

# Every operation draws from a stream of its own. A number, once given, never changes its meaning.
FLIP, CROP_TOP, CROP_LEFT, AREA, RATIO = 1, 2, 3, 4, 5
MIX_KIND, MIX_SHARE, MIX_PARTNER, CUT_TOP, CUT_LEFT = 6, 7, 8, 9, 10
FORWARD = 11  # dropout and the like: the seed of a tile's forward pass
TRIVIAL_KIND, TRIVIAL_LEVEL, TRIVIAL_SIGN = 12, 13, 14
BRIGHTNESS, CONTRAST, SATURATION = 15, 16, 17
ERASE, ERASE_AREA, ERASE_RATIO, ERASE_TOP, ERASE_LEFT = 18, 19, 20, 21, 22
CUTOUT_TOP, CUTOUT_LEFT = 23, 24

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


def mix(words: Words) -> Words:
    """SplitMix64's finaliser: a bijection of uint64 in which every input bit moves every output bit."""
    z = words + _GOLDEN  # arrays of integers wrap around without a warning
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


def _prefix(seed: int, epoch: int, operation: int) -> Words:
    """(1,) uint64: the part of the hash that all ids share."""
    state = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch, operation):
        state = mix(state ^ np.uint64(part))
    return state


_prefix_of = lru_cache(maxsize=256)(_prefix)


def words(ids: NDArray[np.int64], seed: int, epoch: int, operation: int) -> Words:
    """(n,) uint64, one for each id, independent over all four parts of the key."""
    return mix(mix(ids.astype(np.uint64)) ^ _prefix_of(seed, epoch, operation))


def uniform(ids: NDArray[np.int64], seed: int, epoch: int, operation: int) -> NDArray[np.float64]:
    """(n,) float64 in [0, 1): 53 random bits for each id."""
    return (words(ids, seed, epoch, operation) >> _S11).astype(np.float64) * 2.0**-53


def uniforms(ids: NDArray[np.int64], seed: int, epoch: int, operations: tuple[int, ...]) -> NDArray[np.float64]:
    """(k, n) float64: `uniform` of k operations at once, which saves most of the calls where n is small."""
    prefixes = np.concatenate([_prefix_of(seed, epoch, operation) for operation in operations])
    return (mix(mix(ids.astype(np.uint64)) ^ prefixes[:, None]) >> _S11).astype(np.float64) * 2.0**-53


def stream(key: int, seed: int, epoch: int, operation: int) -> Iterator[float]:
    """Endless floats in [0, 1) for one key, for draws that need a number of tries not known in advance."""
    start = words(np.array([key]), seed, epoch, operation)
    number = 0
    while True:
        yield float((mix(start ^ mix(np.array([number], dtype=np.uint64)))[0] >> _S11) * 2.0**-53)
        number += 1


def stream_of(n: int, key: int, seed: int, epoch: int, operation: int) -> NDArray[np.float64]:
    """(n,) float64 in [0, 1): the first n of `stream`."""
    start = words(np.array([key]), seed, epoch, operation)
    return (mix(start ^ mix(np.arange(n, dtype=np.uint64))) >> _S11).astype(np.float64) * 2.0**-53


def beta(alpha: float, floats: Iterator[float]) -> float:
    """A draw of Beta(alpha, alpha) by rejection (Joehnk, "Erzeugung von betaverteilten Zufallszahlen", 1964)."""
    while True:
        x, y = next(floats) ** (1 / alpha), next(floats) ** (1 / alpha)
        if 0 < x + y <= 1:
            return float(x / (x + y))


def tile_key(step: int, lane: int) -> int:
    """The key of a tile within an epoch: for what belongs to a tile and not to a sample."""
    return (step << 24) | lane


def ids_digest(ids: NDArray[np.int64]) -> int:
    """An order-independent hash of a set of ids: the sum of their mixed values modulo 2^64. Sums of parts add up."""
    return int(mix(ids.astype(np.uint64)).sum(dtype=np.uint64))


def full_digest(samples: int, block: int = 1 << 20) -> int:
    """`ids_digest` of 0 .. samples - 1, in bounded memory."""
    total = 0
    for start in range(0, samples, block):
        total += ids_digest(np.arange(start, min(start + block, samples)))
    return total % 2**64
