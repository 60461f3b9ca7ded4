"""What QEMU's user network needs of its host: ports to bind, a name server, and a guard.

The guard is in the preloaded library (rust/tracker/src/network.rs): without it a guest would reach
the host's own loopback through its gateway. So there is no network without the library.
"""

from __future__ import annotations

import re
import socket
from ipaddress import ip_address
from pathlib import Path

from diapause.errors import PortUnavailable, VmmFailed

_LIBRARY = Path(__file__).parent.parent.parent / "native" / "libdiapause_tracker.so"
_REFUSED = re.compile(r"host forwarding rule 'tcp:127\.0\.0\.1:(\d+)-")
_RESOLVERS_MAX = 8


def preloaded(sandbox: str, library: Path = _LIBRARY) -> Path:
    """The library that bars the host's loopback; refuses a network where it is not there."""
    if not library.exists():
        cause = f"{library} is missing, and without it the guest would reach the host's loopback"
        raise VmmFailed(sandbox=sandbox, step="network", cause=cause)
    return library


def resolvers(file: Path = Path("/etc/resolv.conf")) -> list[str]:
    """The host's name servers, which the guest may ask even where they are on the loopback."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return []
    words = [line.split()[1] for line in lines if re.match(r"nameserver\s+\S", line)]
    return [word for word in words if _is_address(word)][:_RESOLVERS_MAX]


def _is_address(word: str) -> bool:
    try:
        ip_address(word)
    except ValueError:
        return False
    return True


def refused_forward(said: str) -> PortUnavailable | None:
    """QEMU's complaint about a port that it could not bind, as an error that names the port."""
    found = _REFUSED.search(said)
    if found is None:
        return None
    port = int(found[1])
    return PortUnavailable(port=port, cause=_why_not(port))


def _why_not(port: int) -> str:
    """What the kernel says to a bind; QEMU does not pass it on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return "it was taken a moment ago"
