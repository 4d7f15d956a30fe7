"""By which address and interface this machine reaches another. `python -m distcnn.network HOST` prints both."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys

from distcnn.errors import EXIT_USAGE, UserError

_SIOCGIFADDR = 0x8915  # netdevice(7): an interface's address
_ANY_PORT = 9  # nothing is sent: connecting a datagram socket only looks up the route


def address_towards(host: str) -> str:
    """This machine's own IPv4 address on the way to `host`. Raises UserError for a name or a route that is not known.

    On `host` itself it is the address that `host` resolves to.
    """
    try:
        target = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, _ANY_PORT))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"the ranks should meet at {host!r}, which this node ({socket.gethostname()}) cannot reach"
            f" ({error.strerror or error}): see host_suffix in site.toml"
        ) from error


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address. Raises UserError if none has."""
    wanted = socket.inet_aton(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                if fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24] == wanted:
                    return name
    if address.startswith("127."):
        return "lo"  # all of 127.0.0.0/8 is there, whatever it is listed with
    raise UserError(f"no network interface of {socket.gethostname()} has the address {address} first")


def main(words: list[str]) -> int:
    """Print "ADDRESS INTERFACE" for the host named in `words`."""
    try:
        address = address_towards(words[0])
        print(address, interface_of(address))
    except UserError as error:
        print(f"distcnn: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
