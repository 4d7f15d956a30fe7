"""Keys of samples: names that are safe in a tar and for webdataset, and never the same twice."""

from __future__ import annotations

import re

from distcnn.data.prepare.source import Source

MAX_KEY_BYTES = 90  # ".json" still fits the 100 bytes of a tar header's name
UNSAFE = re.compile(r"[^A-Za-z0-9_/+=@,-]")  # a dot would end the key: webdataset's extension begins at the first


def make_keys(source: Source) -> list[str]:
    """A key for each image: its name without extension, what is unsafe as '_'; numbered where it would come twice.

    Sources without names of their own have running numbers.
    """
    if not source.named:
        return list(source.names)
    stems = [_stem(name) for name in source.names]
    if (
        not UNSAFE.search("".join(stems))
        and len(set(stems)) == len(stems)
        and len(max(stems, key=len)) <= MAX_KEY_BYTES
    ):
        return stems  # 10 times as fast as one by one
    keys: list[str] = []
    taken: set[str] = set()
    for number, stem in enumerate(stems):
        key = UNSAFE.sub("_", stem)
        if not key or len(key) > MAX_KEY_BYTES or key in taken:
            key = f"{key[: MAX_KEY_BYTES - 11]}-{number:010d}"
        while key in taken:
            key += "_"
        taken.add(key)
        keys.append(key)
    return keys


def _stem(name: str) -> str:
    """A name without its extension and without slashes at its ends."""
    head, dot, tail = name.rpartition(".")
    return (head if dot and "/" not in tail else name).strip("/")
