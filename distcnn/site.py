"""What differs from cluster to cluster: site.toml, and nothing of it in the scripts."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from distcnn.errors import UserError, nearest

SITE_NAME = "site.toml"


@dataclass(frozen=True)
class Site:
    """A cluster's own names and habits. The defaults suit one that asks for none."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    memory: str = ""  # such as "0" for all of a node's
    gpus: str = "--gpus-per-node={n}"  # how GPUs are asked for; or "--gres=gpu:a100:{n}"
    sbatch: tuple[str, ...] = ()  # more flags for sbatch
    srun: tuple[str, ...] = ()  # more flags for srun
    modules: tuple[str, ...] = ()  # loaded before anything starts
    setup: tuple[str, ...] = ()  # shell lines before anything starts
    container: tuple[str, ...] = ()  # words before every command on a node
    python: str = ""  # Python that has distcnn, as the nodes see it; "": the one that submits
    host_suffix: str = ""  # turns a node's address into the one that the ranks shall meet at
    cpus_per_gpu: int = 8

    def __post_init__(self) -> None:
        for name in ("sbatch", "srun", "modules", "setup", "container"):
            for word in getattr(self, name):
                if "\n" in word:
                    raise UserError(f"{name} has a line break within {word!r}: one entry a line")
        for flag in (*self.sbatch, *self.srun, self.gpus):
            if not re.match(r"--?[A-Za-z]", flag):
                raise UserError(f"{flag!r} is no flag: write it as --name=value")
        for name in ("partition", "account", "qos", "constraint", "memory", "host_suffix"):
            if not re.fullmatch(r"[^\s\"'\\]*", getattr(self, name)):
                raise UserError(f"{name} = {getattr(self, name)!r}: no spaces, quotes or backslashes")
        if "{n}" not in self.gpus:
            raise UserError(f"gpus = {self.gpus!r}: {{n}} must stand where the number of GPUs a node goes")
        if self.cpus_per_gpu < 1:
            raise UserError(f"cpus_per_gpu = {self.cpus_per_gpu}: at least 1")


def load_site(path: Path | None) -> Site:
    """The site of a TOML file; without one, of ./site.toml if it is there. Raises UserError naming file and key."""
    file = path or Path(SITE_NAME)
    if path is None and not file.exists():
        return Site()
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from error
    known = {field.name: field.default for field in fields(Site)}
    for name in values:
        if name not in known:
            raise UserError(f"{file}: no setting {name!r}{nearest(name, known)}")
    try:
        return Site(**{name: _as(known[name], value, name) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _as(default: Any, value: Any, name: str) -> Any:
    """`value` in the type of `default`."""
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f'{name} = {value!r} must be a list of strings such as ["cuda/12.8"]')
        return tuple(value)
    if type(value) is not type(default):
        raise UserError(f"{name} = {value!r} must be {'a number' if isinstance(default, int) else 'a string'}")
    return value
