"""Keys of samples: names that are safe in a tar and for webdataset, and never the same twice."""

from __future__ import annotations

import re

from distcnn.data.prepare.source import Source

EXTENSIONS = (".jpg", ".png", ".webp")  # of what is kept
MAX_KEY_BYTES = 90  # ".json" still fits the 100 bytes of a tar header's name
UNSAFE = re.compile(r"[^A-Za-z0-9_/+=@,-]")  # a dot would end the key: webdataset's extension begins at the first


def make_keys(source: Source) -> list[str]:
    """A key for each image: its name without extension, what is unsafe as '_'; numbered where it would come twice.

    Sources without names of their own have running numbers.
    """
    if not source.named:
        return list(source.names)
    stems = [_stem(name) for name in source.names]
    shortest, longest = min(map(len, stems), default=0), max(map(len, stems), default=0)
    if 0 < shortest <= longest <= MAX_KEY_BYTES and len(set(stems)) == len(stems) and not UNSAFE.search("".join(stems)):
        return stems  # as they are, without looking at each: 10 times as fast
    taken: set[str] = set()
    for place, stem in enumerate(stems):
        key, number = UNSAFE.sub("_", stem), place
        if not key or len(key) > MAX_KEY_BYTES or key in taken:
            key = _numbered(key, number)
        while key in taken:  # where a name looks like a number that was given
            number += len(stems)
            key = _numbered(key[:-11], number)
        taken.add(key)
        stems[place] = key
    return stems


def names_tell(source: Source, keys: list[str]) -> bool:
    """Whether the samples' names say more than key and extension do, so that the shards need <key>.json for them.

    For all samples or for none, as readers of the tars expect.
    """
    if not source.named:
        return False
    pairs = zip(source.names, keys, strict=True)
    return not all(name.startswith(key) and name[len(key) :] in EXTENSIONS for name, key in pairs)


def _numbered(key: str, number: int) -> str:
    return f"{key[: MAX_KEY_BYTES - 11]}-{number:010d}"


def _stem(name: str) -> str:
    """A name without its extension and without slashes at its ends."""
    head, dot, tail = name.rpartition(".")
    return (head if dot and "/" not in tail else name).strip("/")
