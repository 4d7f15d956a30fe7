from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from distcnn.meeting import agree


class MemoryStore:
    """As torch's stores: `get` waits for a key. Never cleared, as torchrun's is not."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str, /) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, /) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 10)
            return self._values[key].encode()

    def check(self, keys: list[str], /) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)


def meet(store: MemoryStore, delays: list[float]) -> set[str]:
    """The names that ranks get which come after so many seconds."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        return agree(store, rank, len(delays), 20)

    with ThreadPoolExecutor(len(delays)) as pool:
        return set(pool.map(come, range(len(delays))))


@pytest.mark.parametrize("delays", [[0.0], [0, 0], [0.3, 0], [0, 0.3], [0.1, 0, 0.2, 0.05, 0]])
def test_every_start_gets_a_name_of_its_own_though_the_store_is_full_of_old_ones(delays: list[float]) -> None:
    store, names = MemoryStore(), []
    for _ in range(4):
        found = meet(store, delays)
        assert len(found) == 1
        names += list(found)
    assert len(set(names)) == 4


def test_another_number_of_ranks_meets_in_the_same_store() -> None:
    store = MemoryStore()
    assert len(meet(store, [0] * 5)) == len(meet(store, [0] * 2)) == len(meet(store, [0] * 7)) == 1


def test_who_is_missing_is_named() -> None:
    store = MemoryStore()
    assert meet(store, [0, 0, 0])
    with pytest.raises(TimeoutError, match="rank 1, 2 of 3 did not come"):
        agree(store, 0, 3, 0.1)
    with pytest.raises(TimeoutError, match="rank 0 did not come"):
        agree(store, 2, 3, 0.1)
