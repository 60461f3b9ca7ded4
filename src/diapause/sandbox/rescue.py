"""A guest that stands and that nobody owns is thawed, also when its VMM does not answer at once.

A capture that fails because the VMM reached a bound (a disk that takes minutes to flush, say) may
leave a `stop` behind that takes effect later. Nobody would undo it: so somebody waits for the VMM.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from diapause.errors import DiapauseError
from diapause.limits import RESCUE_S

if TYPE_CHECKING:
    from diapause.driver.qemu.machine import QemuMachine
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.rescue")
_BETWEEN_S = 0.5


def thaw_if_it_stands(machine: QemuMachine) -> None:
    """Thaw a stopped machine; one that has ended is left to its watcher."""
    if machine.alive() and machine.status() == "paused":
        machine.thaw()


def thaw_when_it_answers(host: Host, sandbox: str) -> bool:
    """Ask until the VMM answers or is gone, within a bound; whether the guest can go on."""
    deadline = time.monotonic() + RESCUE_S
    while time.monotonic() < deadline:
        try:
            with host.locks.hold(sandbox):
                guest = host.guests.get(sandbox)
                if guest is None or guest.machine is None:
                    return False  # it ended, or another verb took it
                thaw_if_it_stands(guest.machine)
        except DiapauseError as error:
            log.warning("%s stands and its VMM does not answer: %s", sandbox, error)
        else:
            log.warning("%s was thawed after a capture that failed", sandbox)
            return True
        time.sleep(_BETWEEN_S)
    return False
