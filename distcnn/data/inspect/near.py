"""Images that look alike, among millions, without comparing each with each.

1. pHash: 64 bits, the signs (against their median) of the 8x8 lowest frequencies of a 32x32 luma image (C. Zauner,
   "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). Scaling, another JPEG quality and
   changed brightness turn few of the bits.
2. Pairs at most `RADIUS` bits apart, exactly, by tables: cut the 64 bits into R + k bands; at most R bits differ, so k
   bands are equal for some choice of k; for each choice, sort by those bands and compare neighbours only (G. Manku,
   A. Jain, A. Das Sarma, "Detecting Near-Duplicates for Web Crawling", WWW 2007).
3. Of those pairs, the ones whose details agree: the correlation of 16x16 thumbnails less their local means. Skies and
   seas share their gradients, hence their hashes, but not their details. On CIFAR-10, 0.8 keeps 1,030 of 1,829 pairs
   and few that a person would not call the same picture.
4. How much agreement is no chance, the set itself says: two photographs of a class correlate by 0.03 +- 0.16, two
   handwritten digits of a class by 0.6 +- 0.2, and 0.8 means nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

HASH_SIDE = 32
FREQUENCIES = 8
THUMB = 16
RADIUS = 8
SAME_DETAILS, ALL_DETAILS = 0.8, 0.985  # least correlation that is asked for, and most
CHANCE_SPREADS = 4.7  # standard deviations above that of two images of a class
CHANCE_PAIRS, DRAWN_PAIRS = 20_000, 400_000
FEW_IMAGES = 100  # too few to know what is chance
MIN_DETAIL = 1.5  # gray levels; below, an image has no details to compare
MAX_RUN = 1000  # images that share a table entry and are compared with each other
MAX_PAIRS = 5_000_000
BLOCK_PAIRS = 1 << 16

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]


def perceptual_hash(luma_nSS: NDArray[np.float32]) -> Hashes:
    """(n,) uint64 pHash of (n, 32, 32) luma images."""
    positions = (np.arange(HASH_SIDE) + 0.5) * np.pi / HASH_SIDE
    cosines = np.cos(positions[None, :] * np.arange(FREQUENCIES)[:, None]).astype(np.float32)  # DCT-II (8, 32)
    low = (cosines @ luma_nSS @ cosines.T).reshape(-1, FREQUENCIES**2)  # (n, 64)
    if not len(low):
        return np.empty(0, dtype=np.uint64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)  # without the mean, which has no sign of its own
    return np.packbits(bits, axis=1).view(np.uint64).reshape(-1)


def near_pairs(hashes: Hashes, radius: int = RADIUS) -> tuple[Pairs, int]:
    """(P, 2) places i < j of all hashes at most `radius` bits apart, and the radius; of equal ones, each with its next.

    Of a set in which nearly all images look alike there are too many such pairs: the radius returned is then smaller.
    Where more than MAX_RUN different hashes share a table entry, the far ones among them are not compared.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    equal = np.flatnonzero(np.diff(inverse[order]) == 0)
    pairs = np.stack([order[equal], order[equal + 1]], axis=1)
    while radius > 0 and (found := _unique_pairs(unique, radius)) is None:
        radius //= 2
    if radius > 0 and found is not None:
        pairs = np.concatenate([pairs, first[found]])
    return np.unique(np.sort(pairs.astype(np.int64), axis=1), axis=0), radius


def _unique_pairs(hashes: Hashes, radius: int) -> Pairs | None:
    """(P, 2) places of different hashes at most `radius` bits apart; None if there are too many."""
    n = len(hashes)
    intact = 2 if n < 200_000 else 3  # more bands in a key: more tables, fewer chance neighbours
    edges = np.linspace(0, 64, radius + intact + 1).astype(int)
    masks = [((1 << int(high)) - (1 << int(low))) for low, high in pairwise(edges)]
    codes = np.empty(0, dtype=np.int64)
    for chosen in combinations(masks, intact):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        found = [codes]
        for block in _neighbours(keys[order], hashes[order], order, radius):
            found.append(block)
            if sum(map(len, found)) > MAX_PAIRS:
                return None
        codes = np.unique(np.concatenate(found))
    return np.stack([codes // n, codes % n], axis=1) if n else np.empty((0, 2), dtype=np.int64)


def _neighbours(keys: Hashes, hashes: Hashes, order: Pairs, radius: int) -> Iterator[Pairs]:
    """i * n + j of the pairs with equal keys (sorted) that are at most `radius` bits apart, block by block."""
    n = len(keys)
    at = np.flatnonzero(keys[1:] == keys[:-1])
    distance = 1
    while len(at) and distance <= MAX_RUN:
        close = at[np.bitwise_count(hashes[at] ^ hashes[at + distance]) <= radius]
        one, other = order[close], order[close + distance]
        yield np.minimum(one, other) * n + np.maximum(one, other)
        distance += 1
        at = at[at + distance < n]
        at = at[keys[at] == keys[at + distance]]


def same_details(thumbs: NDArray[np.uint8], labels: NDArray[np.int32]) -> float:
    """The correlation of details from which two images of this set are alike: beyond that of two images of a class."""
    if len(thumbs) < FEW_IMAGES:
        return SAME_DETAILS
    drawn = np.random.default_rng(0).integers(0, len(thumbs), (DRAWN_PAIRS, 2))
    drawn = drawn[(drawn[:, 0] != drawn[:, 1]) & (labels[drawn[:, 0]] == labels[drawn[:, 1]])][:CHANCE_PAIRS]
    if not len(drawn):
        return SAME_DETAILS
    chance = (_details(thumbs[drawn[:, 0]]) * _details(thumbs[drawn[:, 1]])).sum(axis=1)
    beyond = float(chance.mean()) + CHANCE_SPREADS * float(chance.std())
    return min(max(beyond, SAME_DETAILS), ALL_DETAILS)


def alike(thumbs: NDArray[np.uint8], pairs: Pairs, least: float = SAME_DETAILS) -> tuple[Pairs, NDArray[np.float32]]:
    """The pairs whose details correlate by at least `least`, and that correlation (P,), the most alike first.

    `thumbs` are (N, 16, 16) luma.
    """
    kept, scores = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.float32)]
    for start in range(0, len(pairs), BLOCK_PAIRS):
        block = pairs[start : start + BLOCK_PAIRS]
        one, other = _details(thumbs[block[:, 0]]), _details(thumbs[block[:, 1]])
        score = (one * other).sum(axis=1)
        kept.append(block[score >= least])
        scores.append(score[score >= least])
    score = np.concatenate(scores)
    best = np.argsort(-score, kind="stable")
    return np.concatenate(kept)[best], score[best]


def _details(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, 256) what 16x16 thumbnails have beyond the means of their 4x4 parts, of length 1, or 0 if there is none."""
    blocks = thumbs.reshape(-1, 4, 4, 4, 4).astype(np.float32)
    details: NDArray[np.float32] = (blocks - blocks.mean(axis=(2, 4), keepdims=True)).reshape(-1, THUMB**2)
    length = np.linalg.norm(details, axis=1, keepdims=True)
    details /= np.maximum(length, 1e-6)
    details[length[:, 0] < MIN_DETAIL * THUMB] = 0
    return details


def groups(pairs: Pairs) -> list[NDArray[np.int64]]:
    """The sets of two or more images that the pairs join, each sorted, the largest first."""
    parent: dict[int, int] = {}

    def root(place: int) -> int:
        while parent.setdefault(place, place) != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for place in sorted(parent):
        members.setdefault(root(place), []).append(place)
    parts = [np.array(part, dtype=np.int64) for part in members.values()]
    return sorted(parts, key=lambda part: (-len(part), int(part[0])))
