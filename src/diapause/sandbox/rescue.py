"""A guest that stands and that nobody owns is thawed, also when its VMM does not answer at once.

A capture that fails because the VMM reached a bound (a disk that takes minutes to flush, say) may
leave a `stop` behind that takes effect later. Nobody would undo it: so somebody waits for the VMM.

Whatever fails here is tried again, a failed read of the catalog too: these threads are the last who
know of such a guest.

QEMU itself stops a guest whose write the host has no room for, and keeps the request. It is thawed
again and again until the write goes through; meanwhile `inspect` says why it stands.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from typing import TYPE_CHECKING

from diapause.errors import DiapauseError
from diapause.limits import END_S, RESCUE_S, STALL_RETRY_S

if TYPE_CHECKING:
    from diapause.driver.qemu.machine import QemuMachine
    from diapause.sandbox.guests import Guest
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.rescue")
# What the catalog, a monitor and the host may answer with, at any time.
REFUSALS = (DiapauseError, OSError, sqlite3.Error)
_BETWEEN_S = 0.5
_SETTLE_S = 0.2


def thaw_if_it_stands(machine: QemuMachine) -> None:
    """Thaw a stopped machine; one that has ended is left to its watcher."""
    if machine.alive() and machine.status() == "paused":
        machine.thaw()


def is_frozen(host: Host, sandbox: str) -> bool:
    """Whether somebody asked that it stands."""
    record = host.catalog.sandbox(sandbox)
    return record is not None and record.frozen


def thaw_when_it_answers(host: Host, sandbox: str) -> bool:
    """Ask until the VMM answers or is gone, within a bound; whether the guest can go on."""
    deadline = time.monotonic() + RESCUE_S
    while not host.closing and time.monotonic() < deadline:
        try:
            with host.locks.hold(sandbox):
                guest = host.guests.get(sandbox)
                if guest is None or guest.machine is None or is_frozen(host, sandbox):
                    return False  # it ended, or another verb took it
                thaw_if_it_stands(guest.machine)
        except REFUSALS as error:
            log.warning("%s stands and its VMM does not answer: %s", sandbox, error)
        else:
            host.event("thawed", sandbox, cause="a capture failed and its VMM answered late")
            log.warning("%s was thawed after a capture that failed", sandbox)
            return True
        time.sleep(_BETWEEN_S)
    return False


def thaw_if_nobody_owns(host: Host, guest: Guest) -> None:
    """Thaw a guest that was stopped from outside; waits for the verb that it may be in."""
    guest.looked_at = False  # before the look: one that is stopped again is looked at again
    try:
        with host.locks.hold(guest.sandbox, END_S):
            record = host.catalog.sandbox(guest.sandbox)
            ours = host.guests.get(guest.sandbox) is guest and guest.machine is not None
            if not ours or guest.stalled or record is None or record.frozen:
                return
            assert guest.machine is not None
            if guest.machine.alive() and guest.machine.status() == "paused":
                guest.machine.thaw()
                host.event("thawed", guest.sandbox, cause="it stood frozen and nobody owned it")
                log.warning("%s was stopped from outside: thawed", guest.sandbox)
    except REFUSALS as error:
        log.warning("%s was stopped and can't be thawed: %s", guest.sandbox, error)


def go_on_after_stall(host: Host, guest: Guest, reason: str) -> None:
    """Thaw a guest that stands over its disk until it stays running.

    Nothing is written to say so: what is missing is room. `inspect` asks the guest (`stalled`).
    """
    log.warning("%s stands: its disk can't be written (%s)", guest.sandbox, reason)
    host.event("stalled", guest.sandbox, reason=reason)
    while not host.closing and host.guests.get(guest.sandbox) is guest:
        time.sleep(STALL_RETRY_S)
        try:
            with host.locks.hold(guest.sandbox):
                if guest.machine is None or is_frozen(host, guest.sandbox):
                    break  # a thaw makes the request anew
                if _stays_running(guest.machine):
                    break
        except REFUSALS as error:
            log.warning("%s stands and can't be thawed: %s", guest.sandbox, error)
    guest.stalled = None  # from here on an event begins anew; one that was passed over shows now
    if _stands(host, guest):
        host.guest_stalled(guest, reason)


def _stays_running(machine: QemuMachine) -> bool:
    """Thaw it and look again: the request is made anew at once, and stops it anew at once."""
    thaw_if_it_stands(machine)
    time.sleep(_SETTLE_S)
    return not machine.alive() or machine.status() != "paused"


def _stands(host: Host, guest: Guest) -> bool:
    with contextlib.suppress(*REFUSALS), host.locks.hold(guest.sandbox):
        if is_frozen(host, guest.sandbox):
            return False
        if host.guests.get(guest.sandbox) is guest and guest.machine is not None:
            return guest.machine.alive() and guest.machine.status() == "paused"
    return False


def close_later(host: Host, operation: str, outcome: str) -> None:
    """Write the end of an operation that could not be written when it came; within a bound."""
    deadline = time.monotonic() + RESCUE_S
    while not host.closing and time.monotonic() < deadline:
        try:
            host.catalog.journal.end(operation, outcome)
        except REFUSALS as error:
            log.warning("the end of operation %s is not journaled yet: %s", operation, error)
            time.sleep(_BETWEEN_S)
        else:
            return
