"""Where the label of a sample comes from: its .cls, a key of its .json, the folder part of its key, or nowhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distcnn.data.shards import MAX_SMALL_BYTES, TarSample
from distcnn.errors import DataError, UserError, nearest

MAX_CLASSES = 1_000_000
_INTEGER = re.compile(rb"[+-]?[0-9]{1,9}")

Label = int | str


@dataclass(frozen=True)
class LabelRule:
    """`source` says which part of a sample holds its label; `key` is the JSON key for "json", dots for nested ones."""

    source: Literal["cls", "json", "folder", "none"] = "cls"
    key: str = ""

    def __post_init__(self) -> None:
        if (self.source == "json") != bool(self.key):
            raise ValueError(f"label rule {self.source!r} with the key {self.key!r}")

    @property
    def member(self) -> str:
        """The extension of the member that has to be read for it, '' for none."""
        return self.source if self.source in ("cls", "json") else ""

    def label(self, sample: TarSample, text: bytes, shard: str) -> Label | None:
        """The label of a sample, `text` being its `member`: an integer or a class name, None for the rule "none".

        Raises DataError naming shard and key for a label that is missing or is neither.
        """
        if self.source == "none":
            return None
        if self.source == "folder":
            folder = sample.key.rpartition("/")[0].rpartition("/")[2]
            if not folder:
                raise DataError(f"shard {shard}: key {sample.key!r} has no folder to take the label from")
            return folder
        if self.member not in sample.members:
            raise DataError(
                f"shard {shard}: key {sample.key!r} has no .{self.member}, which should hold its label"
                " (--label KEY for a key of .json, --label folder, or --unlabelled SPLIT)"
            )
        if len(text) > MAX_SMALL_BYTES:
            raise DataError(f"shard {shard}: key {sample.key!r} has a .{self.member} of over {MAX_SMALL_BYTES} bytes")
        if self.source == "cls":
            return _integer(text, sample.key, shard)
        return _from_json(text, self.key, sample.key, shard)


def parse_rule(text: str) -> LabelRule:
    """'cls', 'folder', 'none', 'json:KEY', or KEY of the .json. Raises UserError for an empty one."""
    if text in ("cls", "folder", "none"):
        return LabelRule(text)  # type: ignore[arg-type]
    key = text.removeprefix("json:").strip()
    if not key:
        raise UserError("--label takes cls, folder, none, or a key of the .json members")
    return LabelRule("json", key)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names by label: a JSON list, or a line each. Raises UserError naming the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names in {path}: {error}") from error
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a JSON list of class names: {error}") from error
        names = [str(name) for name in listed]
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path} holds no class names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} holds the class {twice!r} twice")
    return tuple(names)


def check_label(label: Label, classes: tuple[str, ...], key: str, shard: str) -> None:
    """Raises DataError naming shard and key for a label that is out of range, or not one of `classes` if given."""
    if isinstance(label, str):
        if classes and label not in classes:
            raise DataError(f"shard {shard}: key {key!r} has the class {label!r}{nearest(label, classes[:1000])}")
        return
    limit = len(classes) or MAX_CLASSES
    if not 0 <= label < limit:
        raise DataError(f"shard {shard}: key {key!r} has the label {label}, out of the range 0 to {limit - 1}")


def _integer(text: bytes, key: str, shard: str) -> int:
    stripped = text.strip()
    if not _INTEGER.fullmatch(stripped):
        raise DataError(f"shard {shard}: key {key!r} has the label {_shown(stripped)}, not an integer")
    return int(stripped)


def _from_json(text: bytes, name: str, key: str, shard: str) -> Label:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"shard {shard}: key {key!r} has a .json that cannot be read: {error}") from error
    found = _lookup(value, name)
    if found is None:
        held = f"; it has {', '.join(sorted(map(str, value))[:20])}" if isinstance(value, dict) else ""
        raise DataError(f"shard {shard}: key {key!r} has no {name!r} in its .json{held}")
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        raise DataError(f"shard {shard}: key {key!r} has the label {_shown(found)}: neither an integer nor a name")
    return found


def _lookup(value: Any, name: str) -> Any:
    """value[name], or value[a][b] for the name 'a.b'; None if there is none."""
    if not isinstance(value, dict):
        return None
    if name in value:
        return value[name]
    first, dot, rest = name.partition(".")
    return _lookup(value.get(first), rest) if dot else None


def _shown(value: Any) -> str:
    text = repr(value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value)
    return text if len(text) <= 60 else text[:60] + "..."
