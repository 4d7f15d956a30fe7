"""Reads back what W&B wrote in offline mode: a file in LevelDB's log format that holds protocol buffers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # bytes; the file begins with a header of as many bytes as a chunk's
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
ENDING = "evaluation/"


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the chunks: 4 bytes of checksum, 2 of length, 1 of kind; none crosses the end of a block."""
    at = HEADER
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        yield kind, data[at + HEADER : at + HEADER + size]
        at += HEADER + size


def records(folder: Path) -> list[Any]:
    """The records (wandb_internal.proto) of the one .wandb file in `folder`."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B", data[:8]
    found, content = [], b""
    for kind, part in chunks(data):
        content += part
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            found.append(record)
            content = b""
    return found


def rows(found: list[Any]) -> list[dict[str, Any]]:
    """The rows logged, without W&B's own columns and without what comes at the end of a run (see `media`)."""
    return [row for row in _history(found) if not any(name.startswith(ENDING) for name in row)]


def media(found: list[Any]) -> set[str]:
    """The names of the tables and charts logged at the end of a run."""
    return {name.partition(".")[0] for row in _history(found) for name in row if name.startswith(ENDING)}


def artifacts(found: list[Any], kind: str) -> list[Any]:
    """The artifacts of a type, in the order in which they were logged."""
    records = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in records if artifact.type == kind]


def _history(found: list[Any]) -> list[dict[str, Any]]:
    out = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            out.append({key: value for key, value in items.items() if not key.startswith("_")})
    return out


def summary(found: list[Any]) -> dict[str, Any]:
    """What the run's summary was set to."""
    values: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                values[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return values
