"""webdataset's side: the exact reader as a source of its pipelines, and its pipelines behind the loader's interface.

`ExactSource` yields `__key__`, `__url__`, `jpg` (or `png`, `webp`) and `cls`, so that

    webdataset.DataPipeline(ExactSource("data/flowers"), webdataset.map(f))

keeps the order and the exactness of this project. `StreamLoader` is the other way round: shards that cannot be indexed
(pipes, stores that list nothing) are drawn with replacement by webdataset, in worker processes, endlessly. Every rank
makes the same number of steps and none waits for shards that it has not got; which samples come, and how often, nobody
promises.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from braceexpand import braceexpand

from distcnn.data.decode import DecodeError, Pixels, decode
from distcnn.data.fill import BadSample
from distcnn.data.loader import Loader, Tile, TileRequest
from distcnn.data.manifest import Manifest, load_manifest
from distcnn.data.order import EpochOrder, Geometry, Ids
from distcnn.data.resize import resize_into
from distcnn.data.shards import IMAGE_MEMBERS, Found, SplitReader, split_name
from distcnn.data.sources import expand, is_remote, open_remote
from distcnn.data.views import View
from distcnn.errors import DataError, UserError

PIPE = "pipe:"
SHUFFLED = 1000  # samples in a worker's shuffle buffer
BLOCK = 32  # samples that a worker sends at once
FAILURES = 10  # shards in a row that give nothing, after which a worker gives up
WANTED = frozenset({*IMAGE_MEMBERS, "cls"})
MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png", b"RIF": "webp"}


class ExactSource(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The samples of a split for one rank, in the order of training, each exactly once an epoch over all ranks.

    In a DataLoader's workers, each takes every n-th step. `set_epoch` chooses the epoch, `first_step` where it begins.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "train",
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        geometry: Geometry | None = None,
        first_step: int = 0,
    ) -> None:
        super().__init__()
        folder = Path(root)
        self.reader = SplitReader(folder, load_manifest(folder).split(split))
        self.geometry = geometry or Geometry(64, 8)
        self.lanes = self.geometry.lanes_of(rank, size)
        self.seed, self.epoch, self.first_step = seed, 0, first_step

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = EpochOrder(self.reader.counts, self.geometry, self.seed, self.epoch)
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first_step + first, order.steps, stride):
            ids = np.concatenate([order.tile(step, lane) for lane in self.lanes])
            found = self.reader.find(ids)
            labels = found.columns["label"].tolist()
            for data, label, (url, key) in zip(
                self.reader.read(ids, found), labels, self.reader.keys(ids), strict=True
            ):
                yield {"__key__": key, "__url__": url, MAGIC.get(data[:3], "jpg"): data, "cls": str(label).encode()}


def stream_shards(text: str, root: Path, manifest: Manifest, allow_pipe: bool) -> list[str]:
    """The shards that --train-split names for a stream: those of a split, of a pattern, or of a command.

    Raises UserError for a command that is not allowed.
    """
    if text in manifest.splits:
        return [s.name if is_remote(s.name) else str(root / s.name) for s in manifest.splits[text].shards]
    if not text.lower().startswith(PIPE):
        return expand(text)
    if not allow_pipe:
        raise UserError(f"--train-split {text!r} would run a command in a shell: give --allow-pipe if you trust it")
    return list(braceexpand(text))


@dataclass(frozen=True)
class Failure:
    """A shard or a sample that a worker could not use. The last of a row of them ends the stream."""

    shard: str
    key: str
    reason: str
    final: bool = False


class StreamReader:
    """Stands where a Loader has its reader: it knows how long an epoch is called, and no samples."""

    def __init__(self, samples: int, where: str) -> None:
        self.counts = np.array([samples], dtype=np.int64)
        self._where = where

    def __len__(self) -> int:
        return int(self.counts[0])

    def keys(self, ids: Ids) -> list[tuple[str, str]]:
        return [(self._where, f"place {place}") for place in ids.tolist()]

    def find(self, ids: Ids) -> Found:
        raise DataError(f"{self._where} is a stream: its samples cannot be found by number")

    def read(self, ids: Ids, found: Found | None = None) -> list[bytes]:
        raise DataError(f"{self._where} is a stream: its samples cannot be read by number")

    def labels(self, ids: Ids) -> Ids:
        raise DataError(f"{self._where} is a stream: its samples cannot be found by number")

    def close(self) -> None:
        """Nothing is open here."""


@dataclass(frozen=True)
class Stream:
    """What a rank draws: shards, how many samples are called an epoch, and the number of classes."""

    shards: tuple[str, ...]
    samples: int
    classes: int
    seed: int
    rank: int = 0

    def __post_init__(self) -> None:
        if not self.shards or self.samples < 1:
            raise UserError("a stream needs shards, and --stream-samples: how many samples to call an epoch")


class StreamLoader(Loader):
    """webdataset's pipelines and WebLoader behind the loader's interface.

    `workers` processes of this rank (0 = in this one) draw shards with replacement, shuffle, decode and cut. The ids of
    a tile are places in the epoch, not samples; weights are always 1: what cannot be read is left out and reported.
    """

    def __init__(self, stream: Stream, view: View, workers: int) -> None:
        where = stream.shards[0] + (" ..." if len(stream.shards) > 1 else "")
        super().__init__(StreamReader(stream.samples, where), view, stream.seed)
        self._blocks = _endless(stream, view, workers)
        self._rest = Block(torch.empty(0), torch.empty(0, dtype=torch.int64))

    def steps(self, requests: Iterable[Sequence[TileRequest]]) -> Iterator[list[Tile]]:
        """One list of tiles for each list of requests. Raises DataError when shard after shard gives nothing."""
        for step in requests:
            yield [self._tile(request) for request in step]

    def close(self) -> None:
        """Stop the workers."""
        self._blocks.close()
        super().close()

    def _tile(self, request: TileRequest) -> Tile:
        n, side = len(request.ids), self.view.size
        images = torch.empty((n, side, side, 3), dtype=torch.uint8)
        labels = torch.empty(n, dtype=torch.int64)
        started, place = time.perf_counter(), 0
        while place < n:
            if not len(self._rest.labels):
                self._rest = next(self._blocks)
                for failure in self._rest.failures:
                    self._note(failure)
            taken, self._rest = self._rest.split(n - place)
            part = slice(place, place + len(taken.labels))
            images[part], labels[part] = taken.images, taken.labels
            place = part.stop
        self.stats.wait_seconds += time.perf_counter() - started
        self.stats.samples += n
        return Tile(request, images, labels, torch.ones(n))

    def _note(self, failure: Failure) -> None:
        if failure.final:
            raise DataError(
                f"{FAILURES} shards in a row gave nothing, the last of them {failure.shard} ({failure.reason})"
            )
        bad = BadSample(failure.shard, failure.key, failure.reason)
        self.stats.bad.append(bad)
        if self.on_bad:
            self.on_bad(bad)


@dataclass(frozen=True)
class Block:
    """What a worker sends at once."""

    images: torch.Tensor  # (k, S, S, 3) uint8
    labels: torch.Tensor  # (k,) int64
    failures: tuple[Failure, ...] = ()

    def split(self, n: int) -> tuple[Block, Block]:
        """The first n samples, and the rest."""
        return Block(self.images[:n], self.labels[:n]), Block(self.images[n:], self.labels[n:])


_Sample = tuple[Pixels, int]


def _pack(made: list[_Sample | Failure]) -> Block:
    samples = [item for item in made if not isinstance(item, Failure)]
    failures = tuple(item for item in made if isinstance(item, Failure))
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    images = torch.from_numpy(np.stack([pixels for pixels, _ in samples])) if samples else torch.empty(0)
    return Block(images, labels, failures)


@dataclass(frozen=True)
class _OwnSeed:
    """A seed of this worker of this rank: with few shards, all of them read the same ones, and must differ in the rest.

    A class, since worker processes that are not forked get it pickled.
    """

    stream: Stream

    def __call__(self) -> int:
        worker = torch.utils.data.get_worker_info()
        return (self.stream.seed + 10_000 * self.stream.rank + (worker.id if worker else 0)) % 2**63


def _shuffled(seed: _OwnSeed, samples: Iterator[Any]) -> Iterator[Any]:
    import webdataset as wds

    made: Iterator[Any] = wds.shuffle(SHUFFLED, seed=seed())(samples)
    return made


def _cut(view: View, classes: int, seed: _OwnSeed, samples: Iterator[Any]) -> Iterator[Any]:
    return _Cut(view, classes, seed())(samples)


def pipeline(stream: Stream, view: View) -> Iterable[Block]:
    """What each worker process runs. It can be pickled, for processes that are not forked."""
    import webdataset as wds

    seed = _OwnSeed(stream)
    made: Iterable[Block] = wds.DataPipeline(
        wds.ResampledShards(list(stream.shards), worker_seed=seed, deterministic=True),
        _members,
        functools.partial(_shuffled, seed),
        functools.partial(_cut, view, stream.classes, seed),
        wds.batched(BLOCK, collation_fn=_pack),
    )
    return made


def _endless(stream: Stream, view: View, workers: int) -> Generator[Block, None, None]:
    """Blocks of samples of the worker processes, for ever."""
    import webdataset as wds

    made = pipeline(stream, view)
    loader = wds.WebLoader(made, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


def _members(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any] | Failure]:
    """The samples of each shard as webdataset makes them of a tar: keys, bytes. Nothing is decoded or unpickled."""
    import webdataset as wds

    in_a_row = 0
    for shard in shards:
        url = str(shard["url"])
        given, reason = 0, "it holds no images"
        try:
            with _opened(url) as file:
                files = wds.tariterators.tar_file_iterator(file, select_files=_is_wanted)
                named = ({**member, "__url__": url} for member in files)
                for sample in wds.tariterators.group_by_keys(named):
                    given += 1
                    yield sample
        except UserError as error:
            reason = str(error)
        except Exception as error:  # tarfile and each protocol have errors of their own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        else:
            if given:
                in_a_row = 0
                continue
        in_a_row = 0 if given else in_a_row + 1
        yield Failure(url, "", reason, final=in_a_row >= FAILURES)


def _is_wanted(name: str) -> bool:
    return split_name(name)[1] in WANTED


@contextlib.contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """A shard as a stream. Commands were allowed where the list of shards was made."""
    if not url.lower().startswith(PIPE):
        with open_remote(url, from_start_to_end=True) if is_remote(url) else Path(url).open("rb") as file:
            yield file
        return
    command = url[len(PIPE) :]
    with subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            while process.stdout.read(1 << 20):  # what follows the tar's end: the command must not meet a closed pipe
                pass
        except Exception:
            _raise_status(process)  # a command that failed explains a tar that ends too soon
            raise
        else:
            _raise_status(process)
        finally:
            process.kill()  # nothing, where it has ended


def _raise_status(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if status := process.wait(1.0):
            raise DataError(f"the command ended with status {status}")


class _Cut:
    """From a webdataset sample to the pixels of the view and the label."""

    def __init__(self, view: View, classes: int, seed: int) -> None:
        self.view, self.classes, self.seed = view, classes, seed

    def __call__(self, samples: Iterable[dict[str, Any] | Failure]) -> Iterator[_Sample | Failure]:
        for number, sample in enumerate(samples):
            if isinstance(sample, Failure):
                yield sample
                continue
            try:
                yield self._cut(sample, number), self._label(sample)
            except DecodeError as error:
                yield Failure(str(sample["__url__"]), str(sample["__key__"]), str(error))

    def _cut(self, sample: dict[str, Any], number: int) -> Pixels:
        """Each time that a sample comes it is cut anew: the draws are keyed by its key and by how many came before."""
        data = next((sample[name] for name in IMAGE_MEMBERS if name in sample), None)
        if data is None:
            raise DecodeError("no image")
        pixels, side = decode(data), self.view.size
        height, width = pixels.shape[:2]
        box = [0, 0, height, width]
        if self.view.kind != "none":
            ids = np.array([(number << 32) | zlib.crc32(str(sample["__key__"]).encode("utf-8", "surrogateescape"))])
            box = self.view.boxes(ids, np.array([height]), np.array([width]), self.seed, 0)[0].tolist()
        slot = np.empty((side, side, 3), dtype=np.uint8)
        resize_into(slot, pixels, box)
        return slot

    def _label(self, sample: dict[str, Any]) -> int:
        text = sample.get("cls", b"").decode("ascii", "replace").strip()
        if not text.isdigit() or int(text) >= self.classes:
            raise DecodeError(f"label {text[:20]!r} is none of the {self.classes} classes")
        return int(text)
