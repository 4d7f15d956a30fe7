"""Two hosts with addresses of their own on this machine: network namespaces joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # RFC 5737: for documentation, never routed


@dataclass(frozen=True)
class Hosts:
    """The namespaces' names. Nothing in them reaches anything but the other one."""

    names: tuple[str, str]

    def on(self, host: int) -> list[str]:
        """The words that run a command on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def cut(self) -> None:
        """Pull the cable: packets vanish, nobody is told."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self.names[1], "link", "set", "cable", "up")


def unavailable() -> str:
    """Why there can be no such hosts here, "" if there can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"distcnn-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed here ({tried.stderr.strip()})"
    _ip("netns", "delete", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make them, and remove them afterwards."""
    hosts = Hosts((f"distcnn-{os.getpid()}-a", f"distcnn-{os.getpid()}-b"))
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        first, second = hosts.names
        _ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(hosts.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
        yield hosts
    finally:
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
