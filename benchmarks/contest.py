"""Contenders that take turns: each is a process of its own, so that none disturbs another or profits from it.

A contender is a generator of the number of images that it has just done, endless. It runs for some seconds when its
turn comes, after a second to warm up; each round goes round all of them, so that they share what else the machine
does. CPU is the processor time that an image took over all threads and worker processes: it says more than the rate
does where the machine is busy.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

Contender = Callable[..., Iterator[int]]
Results = dict[str, list[tuple[float, float]]]  # (images a second, CPU microseconds an image) of each run


def processor_seconds() -> float:
    """Of this process, and of the workers it has."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def serve(pipe: Connection, contender: Contender, least: int, arguments: tuple[Any, ...]) -> None:
    """Run for the seconds that come through the pipe; answer (images a second, CPU microseconds an image)."""
    batches = contender(*arguments)
    while True:
        seconds = pipe.recv()
        if not seconds:
            return
        for duration, fewest in ((1.0, least), (seconds, 1)):
            images, busy, started = 0, processor_seconds(), time.perf_counter()
            while images < fewest or time.perf_counter() - started < duration:
                images += next(batches)
        elapsed = time.perf_counter() - started
        pipe.send((images / elapsed, (processor_seconds() - busy) / images * 1e6))


def contest(
    contenders: Mapping[str, Contender],
    arguments: tuple[Any, ...],
    runs: int,
    seconds: float,
    warm_up: Mapping[str, int] | None = None,
) -> Results:
    """Call each contender with `arguments` in a process of its own. `warm_up`: images at least before it is timed."""
    context = get_context("spawn")
    pipes, processes = {}, []
    for name, contender in contenders.items():
        pipes[name], other = context.Pipe()
        least = (warm_up or {}).get(name, 1)
        processes.append(context.Process(target=serve, args=(other, contender, least, arguments)))
        processes[-1].start()
        other.close()  # so that the end of a contender is seen here
    results: Results = {name: [] for name in contenders}
    try:
        for _ in range(runs):
            for name in contenders:
                pipes[name].send(seconds)
                results[name].append(pipes[name].recv())
        for pipe in pipes.values():
            pipe.send(0)
    except BaseException:
        for process in processes:
            process.terminate()  # one has failed: the others wait for their turn
        raise
    finally:
        for process in processes:
            process.join()
    return results


def report(title: str, results: Results, top: str) -> None:
    """A table of medians, as shares of the contender `top`."""
    load = os.getloadavg()[0]
    print(f"\n{title}")
    print(f"medians of {len(next(iter(results.values())))} runs; load average {load:.1f} on {os.cpu_count()} cores")
    best = statistics.median(rate for rate, _ in results[top]) if top in results else 0.0
    print(f"{'':<28}{'images/s':>10}{'lowest':>10}{'highest':>10}{'of ' + top:>16}{'CPU us':>11}")
    for name, rows in results.items():
        rates = [rate for rate, _ in rows]
        rate, busy = statistics.median(rates), statistics.median(cpu for _, cpu in rows)
        share = f"{rate / best:.1%}" if best else ""
        print(f"{name:<28}{rate:>10,.1f}{min(rates):>10,.1f}{max(rates):>10,.1f}{share:>16}{busy:>11,.1f}")
    sys.stdout.flush()
