"""Filling slots in processes instead of threads: nobody waits for the interpreter's lock.

Between reading, decoding and scaling an image Python holds the lock for a few microseconds, and whoever wants it
meanwhile is put to sleep. Two processes make 1.2 to 1.6 times as many images of 32 px ready as two threads, and as many
at 128 px; where turbojpeg.py has its library, threads need no lock either and are faster (benchmarks/LOG.md). Pixels
are written straight into the loader's buffers, which the processes map; what is sent to and fro is where samples lie.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from distcnn.data.fill import Filled, Filler
from distcnn.data.order import Ids
from distcnn.data.prepare.pool import end_with
from distcnn.data.readers import Reader
from distcnn.data.shards import Found
from distcnn.data.shared import Address, Mappings
from distcnn.data.views import View
from distcnn.errors import LostRank

# A launcher or SLURM may send these to every process of a job; when to stop is for the process that trains to say.
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Processes:
    """`count` processes, each with a `Filler` of its own; `reader` is pickled for them."""

    def __init__(self, count: int, reader: Reader, seed: int, reduce: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once, by the server that they are forked from
        self._executor = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(reader, seed, reduce))
        for _ in range(count):
            self._executor.submit(int)  # they come up while the model is built

    def fill(self, ids: Ids, found: Found, buffer: Address, first: int, epoch: int, view: View) -> Future[Filled]:
        """`Filler.fill` of the slots from `first` on of a buffer of slots (S, S, 3). Raises LostRank as `result_of`."""
        with _telling_of_the_lost():
            return self._executor.submit(_fill, ids, found, buffer, first, epoch, view)

    def shutdown(self, cancel_futures: bool = False) -> None:
        """End the processes, as an executor does."""
        self._executor.shutdown(cancel_futures=cancel_futures)


def result_of(chunk: Future[Filled]) -> Filled:
    """What has been filled. Raises LostRank if a process was killed."""
    with _telling_of_the_lost():
        return chunk.result()


@contextmanager
def _telling_of_the_lost() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise LostRank(
            "a process that decodes was killed, perhaps for want of memory: run it again, with fewer --decode-processes"
        ) from error


class _Worker:
    """What a process has of its own."""

    def __init__(self, reader: Reader, seed: int, reduce: bool) -> None:
        self.filler = Filler(reader, seed, None, reduce)
        self.mappings = Mappings()


_workers: list[_Worker] = []  # in a process that decodes: the one


def _begin(reader: Reader, seed: int, reduce: bool) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()
    end_with(parent)
    torch.set_num_threads(1)
    _workers.append(_Worker(reader, seed, reduce))


def _end_when_told(parent: int | None) -> None:
    """By the process that trains, as the executor does where another worker has died; SIGTERM from others is not."""
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(1)


def _fill(ids: Ids, found: Found, buffer: Address, first: int, epoch: int, view: View) -> Filled:
    worker = _workers[0]
    image = view.size * view.size * 3
    memory = worker.mappings.pixels(buffer)[first * image : (first + len(ids)) * image]
    return worker.filler.fill(ids, found, memory.reshape(-1, view.size, view.size, 3), epoch, view)
