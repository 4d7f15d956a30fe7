"""How well windows shuffle, beside a full shuffle: ImageNet's size, shards sorted by class (the worst) or shuffled.

    python benchmarks/shuffle.py [--batch 1024] [--tile 64]

No images: only ids. For each window (in shards) over one epoch: the distance of consecutive samples' positions in the
shards, as a share of a full shuffle's (N / 3 in expectation); the spread of class counts in a batch, as the ratio of
their mean square deviation to a full shuffle's (1 = as good; more = classes come in clumps); and how many of a batch's
samples share a class with another of the batch, against a full shuffle.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from distcnn.data.order import EpochOrder, Geometry, automatic_window

SAMPLES, SHARDS, CLASSES = 1_281_167, 1_168, 1_000
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 10_000)


def epoch_ids(order: EpochOrder, steps: int) -> NDArray[np.int64]:
    """Ids of the first `steps` steps, as a process of a single rank sees them."""
    lanes = range(order.geometry.lanes)
    return np.concatenate([order.tile(step, lane) for step in range(steps) for lane in lanes])


def quality(ids: NDArray[np.int64], classes: NDArray[np.int64], batch: int) -> tuple[float, float, float]:
    """(mean distance, mean square deviation of class counts a batch, share of samples with company of their class)."""
    distance = float(np.abs(np.diff(ids)).mean())
    rows = classes[ids[: len(ids) // batch * batch]].reshape(-1, batch)
    counts = np.stack([np.bincount(row, minlength=CLASSES) for row in rows])
    company = float(counts[counts > 1].sum() / rows.size)
    return distance, float(((counts - batch / CLASSES) ** 2).mean()), company


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    asked = parser.parse_args()
    counts = np.full(SHARDS, SAMPLES // SHARDS)
    counts[: SAMPLES % SHARDS] += 1
    rng = np.random.default_rng(0)
    by_class = np.arange(SAMPLES) * CLASSES // SAMPLES
    geometry = Geometry(asked.batch, asked.tile)
    print(f"{SAMPLES} samples, {SHARDS} shards, {geometry.lanes} lanes; automatic window: {automatic_window(counts)}")
    print(f"{'shards':<10}{'window':>8}{'distance':>10}{'classes':>9}{'company':>9}{'s':>7}")
    for name, classes in (("sorted", by_class), ("shuffled", rng.permutation(by_class))):
        full = quality(rng.permutation(SAMPLES)[: asked.steps * asked.batch], classes, asked.batch)
        for window in WINDOWS:
            started = time.process_time()
            ids = epoch_ids(EpochOrder(counts, geometry, 0, 0, window), asked.steps)
            seconds = time.process_time() - started
            shares = [one / other for one, other in zip(quality(ids, classes, asked.batch), full, strict=True)]
            text = "whole lane" if window > SHARDS else str(window)
            print(f"{name:<10}{text:>8}{shares[0]:>10.2f}{shares[1]:>9.2f}{shares[2]:>9.2f}{seconds:>7.1f}")


if __name__ == "__main__":
    main()
