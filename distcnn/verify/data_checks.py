"""Checks of what is trained on: the right samples, once each, with the same pixels everywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from distcnn.build import make_balance, make_order
from distcnn.data.loader import TileRequest
from distcnn.data.order import every_time
from distcnn.data.shards import SplitReader
from distcnn.verify.evidence import Evidence, called, troubles
from distcnn.verify.launch import TileRow, Trace
from distcnn.verify.record import digest
from distcnn.verify.result import Result, plural

OTHER_THREADS = ((1, False), (3, True))  # (threads, whether they read ahead)
MAX_PIXEL_SAMPLES = 1000  # that are made again with other threads


def check_order(evidence: Evidence) -> Result:
    """Each sample once in an epoch: in the order of the whole set, and in what the processes were seen to train on."""
    result = Result("order", demanded="each sample once, the same tiles from any processes")
    walked = _walk(evidence, result)
    one = evidence.one
    trained = 0
    for trace in evidence.compared:
        for epoch, wanted in enumerate(_epochs(one)):
            got = [tile for place, tiles in trace.tiles.items() if place[0] == epoch for tile in tiles]
            if trace is one:
                wanted = Counter(evidence.reference.expected(epoch).tolist())
            problem = _compare(evidence, trace, epoch, Counter(s for tile in got for s in tile.ids), wanted)
            if problem:
                result.problems.append(problem)
            trained += sum(len(tile.ids) for tile in got)
        if not result.problems:
            result.problems += _same_places(one, trace) + _ledger(trace)
    result.problems += troubles(evidence.compared)
    result.figures = {"samples": walked, "trained": trained}
    result.measured = f"order of {walked:,} samples walked through for 2 epochs; {trained:,} seen in training"
    return result


def _walk(evidence: Evidence, result: Result) -> int:
    """Go through two epochs of the user's whole split, as ids alone."""
    config = evidence.full
    split = evidence.dataset.manifest.split(config.data.train_split)
    reader = SplitReader(evidence.dataset.root, split)
    balance = make_balance(config, evidence.dataset, reader)
    for epoch in range(2):
        order = make_order(config, reader.counts, epoch, balance)
        lanes = [order.lane_slice(c, 0, order.lane_length(c)) for c in range(config.geometry.lanes)]
        found = np.sort(np.concatenate(lanes))
        wanted = np.sort(every_time(balance.times(epoch) if balance else np.ones(split.samples, np.int64)))
        if not np.array_equal(found, wanted):
            ids, times = np.unique(found, return_counts=True)
            result.problems.append(
                f"in the order of epoch {epoch} {plural(len(np.setdiff1d(wanted, ids)), 'sample')} of {len(wanted):,}"
                f" never come and {plural(int((times > 1).sum()), 'sample')} come more than once"
            )
    reader.close()
    return len(wanted)


def _epochs(trace: Trace) -> Iterator[Counter[int]]:
    """The samples of each epoch."""
    for epoch in sorted({epoch for epoch, _ in trace.tiles}):
        yield Counter(s for place, tiles in trace.tiles.items() if place[0] == epoch for t in tiles for s in t.ids)


def _compare(evidence: Evidence, trace: Trace, epoch: int, got: Counter[int], wanted: Counter[int]) -> str:
    """ "" or what is wrong with the samples of an epoch."""
    if not got and trace.trouble:
        return ""
    missing, extra = wanted - got, got - wanted
    who = f"with {called(trace)}, epoch {epoch}"
    if extra:
        twice = sorted(extra)
        text = f"{who}: {plural(len(twice), 'sample')} more than once: {evidence.names(twice)}"
        return text + (f", and {plural(missing.total(), 'sample')} never" if missing else "")
    if not missing:
        return ""
    share = got.total() / wanted.total()
    if trace.processes > 1 and abs(share - 1 / trace.processes) < 0.1 / trace.processes:
        return (
            f"{who}: {missing.total():,} of {wanted.total():,} samples are never trained on, each process sees 1 of"
            f" {trace.processes} of its own: the data are sharded twice"
        )
    return f"{who}: {plural(missing.total(), 'sample')} never trained on: {evidence.names(sorted(missing))}"


def _same_places(one: Trace, trace: Trace) -> list[str]:
    """Whether each tile has the same samples in the same order as with one process."""
    for place, tiles in one.tiles.items():
        mine = {tile.lane: tile.ids for tile in trace.tiles.get(place, [])}
        for tile in tiles:
            if mine.get(tile.lane, tile.ids if trace.trouble else None) != tile.ids:
                return [
                    f"with {called(trace)} the samples of epoch {place[0]}, step {place[1]}, lane {tile.lane} are"
                    " others, or in another order, than with 1"
                ]
    return []


def _ledger(trace: Trace) -> list[str]:
    bad = [row["epoch"] for row in trace.ledger if not row["exactly_once"]]
    if bad or not (trace.ledger or trace.trouble):
        return [f"ledger.jsonl of the run with {called(trace)} does not prove epoch {bad[0] if bad else 0}"]
    return []


def check_pixels(evidence: Evidence) -> Result:
    """The same pixels and labels for a sample, whichever process or thread has made them."""
    result = Result("pixels", demanded="equal bits from any processes and threads")
    one = evidence.one
    wanted = dict(_seen(one))
    for trace in evidence.compared[1:]:
        got = dict(_seen(trace))
        both = got.keys() & wanted.keys()
        other = sorted(key for key in both if got[key][0] != wanted[key][0])
        labels = sorted(key for key in both if got[key][1:] != wanted[key][1:])
        if other:
            result.problems.append(_unkeyed(evidence, other, len(both), f"with {called(trace)} as with 1"))
        elif labels:
            epoch, sample = labels[0]
            result.problems.append(
                f"sample {evidence.names([sample])} has labels {got[epoch, sample][1:]} in epoch {epoch} with"
                f" {called(trace)}, {wanted[epoch, sample][1:]} with 1"
            )
    again = 0
    for threads, ahead in OTHER_THREADS:
        again, other = _again(evidence, one, threads, ahead)
        if other:
            result.problems.append(_unkeyed(evidence, other, again, f"with {plural(threads, 'thread')} as in training"))
    result.problems += troubles(evidence.compared)
    result.figures = {"samples": len(wanted), "again": again}
    counts = " and ".join(str(threads) for threads, _ in OTHER_THREADS)
    result.measured = f"{len(wanted):,} augmented images alike; {again:,} made again by {counts} threads"
    return result


def _unkeyed(evidence: Evidence, other: list[tuple[int, int]], of: int, when: str) -> str:
    epoch, sample = other[0]
    return (
        f"{len(other):,} of {of:,} augmented images are not the same {when} (sample {evidence.names([sample])}, epoch"
        f" {epoch}): draws must be keyed by (seed, epoch, sample), not come from a worker's own generator"
    )


def _seen(trace: Trace) -> Iterator[tuple[tuple[int, int], tuple[str, list[int], float]]]:
    """((epoch, sample), (digest of its pixels, labels, share)) of all that a run trained on."""
    for tiles in trace.tiles.values():
        for tile in tiles:
            for sample, pixels, labels in zip(tile.ids, tile.pixels, tile.labels, strict=False):
                yield (tile.epoch, sample), (pixels, labels, tile.share)


def _again(evidence: Evidence, one: Trace, threads: int, ahead: bool) -> tuple[int, list[tuple[int, int]]]:
    """(how many samples were made again, the (epoch, sample) whose pixels then differ)."""
    rows: list[TileRow] = []
    for tiles in one.tiles.values():
        for tile in tiles:
            if tile.ids and sum(len(row.ids) for row in rows) + len(tile.ids) <= MAX_PIXEL_SAMPLES:
                rows.append(tile)
    requests = [TileRequest(row.epoch, row.step, row.lane, np.array(row.ids, dtype=np.int64)) for row in rows]
    made = evidence.reference.pixels(requests, threads, ahead)
    other = [
        (row.epoch, sample)
        for row, x_NCHW in zip(rows, made, strict=True)
        for sample, image, pixels in zip(row.ids, x_NCHW, row.pixels, strict=True)
        if digest([image])[:16] != pixels
    ]
    return sum(len(row.ids) for row in rows), other
