"""How the processes of a start agree that they are of this start, through a store that earlier starts have written to.

torchrun keeps one store for all its restarts (torch 2.5 and later, pytorch issue 135712). Without more ado a restarted
process finds there the addresses of processes that are dead, and torchrun's restarts fail as often as not.

Each rank writes a word that nobody has used before; rank 0 publishes all words together with a name for this start; a
rank that finds its own word in it knows the name to be new, and says so; rank 0 goes on when all have.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Protocol

_PREFIX = "distcnn/meeting/"
_WAIT_SECONDS = 0.02


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


def agree(store: Store, rank: int, size: int, seconds: float) -> str:
    """The name of this start, the same on all `size` ranks and never used before. Raises TimeoutError.

    All ranks call it; none returns before all have called.
    """
    until = time.monotonic() + seconds
    return _lead(store, size, until) if rank == 0 else _follow(store, rank, until)


def _lead(store: Store, size: int, until: float) -> str:
    name = secrets.token_hex(8)
    published: dict[str, str] = {}
    while True:
        words = _read(store, "word", size)
        if words != published:
            published = words
            store.set(f"{_PREFIX}start", json.dumps({"name": name, "words": words}))
        answers = _read(store, "answer", size)
        missing = [rank for rank in range(1, size) if answers.get(str(rank)) != name]
        if not missing:
            return name
        if time.monotonic() > until:
            raise TimeoutError(f"rank {', '.join(map(str, missing[:8]))} of {size} did not come")
        time.sleep(_WAIT_SECONDS)


def _follow(store: Store, rank: int, until: float) -> str:
    word = secrets.token_hex(8)
    store.set(f"{_PREFIX}word/{rank}", word)
    while True:
        if store.check([f"{_PREFIX}start"]):
            start = json.loads(store.get(f"{_PREFIX}start"))
            if start["words"].get(str(rank)) == word:
                store.set(f"{_PREFIX}answer/{rank}", start["name"])
                return str(start["name"])
        if time.monotonic() > until:
            raise TimeoutError("rank 0 did not come")
        time.sleep(_WAIT_SECONDS)


def _read(store: Store, kind: str, size: int) -> dict[str, str]:
    """What the ranks have written, those that have."""
    keys = {str(rank): f"{_PREFIX}{kind}/{rank}" for rank in range(1, size)}
    return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
