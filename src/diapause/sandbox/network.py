"""A guest's network: what a person asks for, and what a capture, a resume and a fork do to it.

`--net user` is QEMU's user network: the guest reaches what the host reaches, through sockets of the
VMM's own. Nobody reaches the guest but through forwarded ports, and those are bound on the host's
127.0.0.1 only. The forwards belong to the sandbox, not to its snapshots: a resume binds the same
ports again, a fork has none.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diapause.driver.base import Forward
from diapause.errors import InvalidRequest
from diapause.limits import PORT_FORWARDS_MAX
from diapause.model import PortForward

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.guest.images import Image
    from diapause.model import RunRequest

PORT_MAX = 65535
NETWORKS = ("none", "user")
CUT_BY_PAUSE = (
    "the guest's open connections are cut: each is reset when it is next used after the resume"
)
FORK_HAS_NO_FORWARDS = "port forwards stay with the source; the forks have none"


def check_network(request: RunRequest) -> None:
    """Refuse a network or forwards that can't be."""
    if request.net not in NETWORKS:
        cause = f"there are: {', '.join(NETWORKS)}"
        raise InvalidRequest(what=f"The network {request.net!r}", cause=cause)
    if request.ports and request.net == "none":
        raise InvalidRequest(what="A port forward", cause="it needs a network: --net user")
    if len(request.ports) > PORT_FORWARDS_MAX:
        raise InvalidRequest(what="The port forwards", cause=f"at most {PORT_FORWARDS_MAX}")
    forwards = parse_forwards(request.ports)
    if len({forward.host for forward in forwards}) != len(forwards):
        raise InvalidRequest(what="The port forwards", cause="a port of the host is there twice")


def check_image(request: RunRequest, image: Image) -> None:
    """Refuse a network for an image whose guest would not take it up."""
    if request.net != "none" and not image.manifest.network:
        cause = f"image {request.image!r} was built without a driver for it; build it anew"
        raise InvalidRequest(what="A network in the guest", cause=cause)


def parse_forwards(ports: list[str]) -> list[PortForward]:
    """`HOST:GUEST` each, both 1 to 65535."""
    forwards = []
    for text in ports:
        found = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", text, re.ASCII)
        numbers = [int(number) for number in found.groups()] if found else []
        if not numbers or not all(1 <= number <= PORT_MAX for number in numbers):
            what = f"The port forward {text[:40]!r}"
            raise InvalidRequest(what=what, cause=f"write HOST:GUEST, each 1 to {PORT_MAX}")
        forwards.append(PortForward(host=numbers[0], guest=numbers[1]))
    return forwards


def has_network(record: SandboxRecord | SnapshotRecord) -> bool:
    """Whether the machine has a network device."""
    return record.net == "user"


def forwards_of(record: SandboxRecord) -> tuple[Forward, ...]:
    """The forwards as the driver takes them."""
    return tuple(Forward(port.host, port.guest) for port in record.ports)
