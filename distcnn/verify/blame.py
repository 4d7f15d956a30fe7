"""Finds out what is wrong with a sum over tiles, by asking how often each tile has entered it.

If a sum should be g_0 + g_1 + ..., and something else came out, the factors a_c for which a_0 g_0 + a_1 g_1 + ... comes
nearest (least squares) tell what happened: zeros for a process that is missing, one common factor for a wrong division.
"""

from __future__ import annotations

import torch

from distcnn.config import TrainConfig
from distcnn.verify.result import plural

CLOSE = 0.02  # two factors are the same within this
MAX_BYTES = 1 << 31  # of all shares together


def factors_of(shares: dict[int, torch.Tensor], got: torch.Tensor) -> tuple[dict[int, float], float]:
    """(lane -> how often its share is in `got`, the rest that no factors explain as a share of `got`)."""
    rows = torch.stack([share.double() for share in shares.values()])  # (lanes, n)
    found = torch.linalg.pinv(rows @ rows.T, rtol=1e-10) @ (rows @ got.double())
    rest = float((got.double() - found @ rows).norm() / got.double().norm().clamp(min=1e-300))
    return dict(zip(shares, found.tolist(), strict=True)), rest


def explain(factors: dict[int, float], rest: float, sizes: list[int], config: TrainConfig, processes: int) -> str:
    """What the factors of the lanes' tiles, of these `sizes`, say of a sum made by `processes`."""
    if rest > CLOSE:
        return "it is no sum of what the tiles should give"
    batch, samples = config.geometry.global_batch, sum(sizes)
    values = list(factors.values())
    first = values[0]
    if all(_same(value, 1) for value in values):
        return "every tile has entered once"
    if all(_same(value, first) for value in values):
        if _same(first, samples / batch):
            return f"the sum was divided by the global batch ({batch}) instead of the step's {samples} samples"
        for count, how in ((processes, "multiplied"), (1 / processes, "divided")):
            if processes > 1 and _same(first, count):
                return f"the sum was {how} by the {processes} processes"
        return f"every tile has entered {first:.3g} times"
    tiles = sum(1 for size in sizes if size)
    if all(_same(value, samples / (tiles * sizes[lane])) for lane, value in factors.items()):
        return f"each tile's mean counts alike, though the tiles have {_sizes(sizes)} samples"
    return _by_rank(factors, config, processes)


def _by_rank(factors: dict[int, float], config: TrainConfig, processes: int) -> str:
    geometry = config.geometry
    owned = {rank: [c for c in geometry.lanes_of(rank, processes) if c in factors] for rank in range(processes)}
    absent = [rank for rank, lanes in owned.items() if lanes and all(_same(factors[c], 0) for c in lanes)]
    if absent and processes > 1:
        there = [rank for rank in owned if rank not in absent]
        lost = " and ".join(f"rank {rank} (lanes {owned[rank][0]} to {owned[rank][-1]})" for rank in absent)
        if len(there) == 1 and len(absent) > 0 and not all(_same(factors[c], 1) for c in owned[there[0]]):
            return f"only rank {there[0]}'s tiles are in it: {lost} did not enter"
        return f"{lost} did not enter the sum"
    odd = [c for c, value in factors.items() if not _same(value, 1)]
    lasts = [lanes[-1] for lanes in owned.values() if lanes]
    if odd == lasts or set(odd) <= set(lasts):
        times = ", ".join(f"{factors[c]:.3g}" for c in odd)
        tile = "the last tile" if processes == 1 else f"the last {plural(len(odd), 'tile')} of the processes"
        return f"{tile} (the last accumulation) entered {times} times instead of once"
    return "the tiles have entered " + ", ".join(f"{value:.3g}" for value in factors.values()) + " times"


def _same(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= CLOSE * max(abs(wanted), 1.0)


def _sizes(sizes: list[int]) -> str:
    return " and ".join(str(size) for size in sorted({size for size in sizes if size}))
