"""Recovery: what a new daemon makes of what the last one left.

Each sandbox whose row says that something runs, or that a verb was under way, is settled by asking
the world: is the process there, is it running, was the capture committed, which overlay does the
disk write to. Afterwards every sandbox is running, paused, stopped or failed with a cause, and
nothing runs that no row names.

| last daemon died in | the row says | what is done |
|---|---|---|
| run, fork | creating | the VMM is ended, the row goes |
| resume | resuming | the VMM is ended, paused again |
| pause before its commit | running, pausing | the guest is thawed where it stands |
| pause after its commit | pausing, a new snapshot | the VMM is ended, paused |
| save before its commit | running | thawed; the sealed buffer's pages go into the next capture |
| resume --cold | resuming | the VMM is ended, stopped or failed again |
| restore | as before, or paused at the snapshot | what is left of the VMM is ended |
| freeze | running | thawed where it stands |
| thaw | frozen, running | as the row says |
| rm | removing | removed |
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from diapause import _core
from diapause.driver.base import ProcessRef
from diapause.driver.process import is_alive
from diapause.driver.qemu.command import node_name
from diapause.driver.qemu.frozen import top_node
from diapause.errors import DiapauseError, NotEnoughSpace, StorageFailed
from diapause.limits import AGENT_READY_S, RESCUE_S
from diapause.operation import shielded
from diapause.sandbox.guests import Guest
from diapause.sandbox.losses import fail_lost_captures, fail_lost_sandboxes, guest_lost
from diapause.sandbox.mend import mend_snapshot_rows
from diapause.sandbox.remove import Remove, end_orphan
from diapause.sandbox.rescue import thaw_if_it_stands
from diapause.sandbox.sweep import end_strays, sweep
from diapause.snapshot.capture import CaptureFiles
from diapause.store.boot import boot_id
from diapause.store.files import remove_tree

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import SandboxRecord
    from diapause.driver.qemu.machine import QemuMachine
    from diapause.journal import OperationRecord
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.recovery")
_BETWEEN_S = 0.5
# What a host may refuse to anybody at any time, and grant the next moment.
_OF_THE_HOST = (NotEnoughSpace, StorageFailed, OSError, sqlite3.Error, MemoryError)


def recover(host: Host) -> None:
    """Settle every sandbox, end what nobody names, remove what belongs to nobody."""
    host.settle_later = lambda sandbox: host.watch(partial(settle_when_it_answers, host, sandbox))
    mend_snapshot_rows(host)
    host.ondemand.adopt()
    fail_lost_captures(host)
    silent = [record.id for record in host.catalog.sandboxes() if not _settled(host, record)]
    for operation in host.catalog.journal.open_operations():
        if operation.sandbox not in silent:
            host.catalog.journal.end(operation.id, "recovered")  # of sandboxes that are gone
    for sandbox in silent:
        host.settle_later(sandbox)
    fail_lost_sandboxes(host)
    end_strays(host)
    sweep(host)


def _settled(host: Host, record: SandboxRecord) -> bool:
    """Whether it could be settled; a VMM that runs and does not answer is no failed sandbox."""
    process = record.process
    try:
        settle(host, record)
    except Exception as error:
        # Whatever it is: one bad sandbox keeps no home from opening.
        known = isinstance(error, DiapauseError)
        log.warning("recovery of %s: %s", record.id, error, exc_info=not known)
        if process and is_alive(ProcessRef(process.pid, process.start_ticks, process.boot_id)):
            return False
        if isinstance(error, _OF_THE_HOST):
            return False  # no word of the sandbox: it is tried again
        if not isinstance(error, DiapauseError):
            cause = f"{type(error).__name__}: {error}"
            error = guest_lost(host.catalog, record, f"it could not be settled: {cause}")
        record.state, record.error = "failed", error.to_dict()
        try:
            host.catalog.put_sandbox(record)
        except DiapauseError as refused:
            log.warning("%s can't be said to have failed: %s", record.id, refused)
            return False
    return True


def settle_when_it_answers(host: Host, sandbox: str) -> None:
    """Try again until the VMM answers or is gone, within a bound; any verb does the same."""
    deadline = time.monotonic() + RESCUE_S
    while not host.closing and time.monotonic() < deadline:
        try:
            with host.locks.hold(sandbox):
                record = host.catalog.sandbox(sandbox)
                if record is not None and is_unsettled(host, record):
                    settle(host, record)
            return
        except DiapauseError as error:
            log.warning("%s is not settled yet: %s", sandbox, error)
        except Exception:
            log.exception("%s is not settled yet", sandbox)
        time.sleep(_BETWEEN_S)


def is_unsettled(host: Host, record: SandboxRecord) -> bool:
    """Whether a verb, of this daemon or the last one, left something to be settled."""
    under_way = record.state in ("creating", "pausing", "resuming", "removing")
    unknown = record.state in ("running", "frozen") and record.id not in host.guests
    return under_way or unknown or bool(host.catalog.journal.open_operations(record.id))


def settle(host: Host, record: SandboxRecord) -> None:
    """Bring one sandbox out of a verb that nobody is taking any further; nobody may hold it."""
    with shielded():  # another verb's work, whatever becomes of the one that found it
        _settle(host, record)


def _settle(host: Host, record: SandboxRecord) -> None:
    operations = host.catalog.journal.open_operations(record.id)
    if record.state == "creating":
        end_orphan(host, record.id)
        Remove(host, record).execute()
    elif record.state == "resuming":
        end_orphan(host, record.id)
        if any(operation.verb == "cold" for operation in operations):
            ended_again(host, record)
        else:
            settle_paused(host, record)
    elif record.state == "paused" and any(o.verb == "restore" for o in operations):
        end_orphan(host, record.id)
        settle_paused(host, record)
    elif record.state == "removing":
        Remove(host, record).execute()
    elif record.state in ("running", "frozen", "pausing"):
        _settle_running(host, record, operations)
    for operation in operations:
        host.catalog.journal.end(operation.id, "recovered")


def _settle_running(host: Host, record: SandboxRecord, operations: list[OperationRecord]) -> None:
    machine = _adopt(host, record)
    captures = [operation for operation in operations if operation.verb in ("pause", "save")]
    pauses = [capture for capture in captures if capture.verb == "pause"]
    if record.state == "pausing" and any(_committed(host, pause) for pause in pauses):
        if machine is not None:
            _disarm(host, record)
            machine.kill()
        settle_paused(host, record)
        return
    if machine is None:
        gone = "lost with the host" if _of_another_boot(record) else "the VMM has ended"
        _let_go(host, record, gone)
        host.end(record, gone)
        return
    for capture in captures:
        if _committed(host, capture):
            _finish_capture(host, record, machine)
        else:
            _drop_capture(host, record, machine, capture)
    _take_up(host, record, machine)


def _committed(host: Host, capture: OperationRecord) -> bool:
    """Its snapshot's row says so; the sandbox's may speak of a later one."""
    return capture.snapshot is not None and host.catalog.snapshot(capture.snapshot) is not None


def _disarm(host: Host, record: SandboxRecord) -> None:
    guest = host.guests.get(record.id)
    if guest is not None:
        with contextlib.suppress(DiapauseError):
            guest.disarm()


def _let_go(host: Host, record: SandboxRecord, gone: str) -> None:
    """A guest under this daemon whose VMM is gone."""
    _disarm(host, record)
    guest = host.guests.pop(record.id, None)
    if guest is not None:
        guest.cut(gone)
        if guest.machine is not None:
            guest.machine.kill()


def _adopt(host: Host, record: SandboxRecord) -> QemuMachine | None:
    guest = host.guests.get(record.id)
    if guest is not None and guest.machine is not None:  # its monitor takes one client: this one
        return guest.machine if guest.machine.alive() else None
    process = record.process
    if process is None:
        return None
    ref = ProcessRef(process.pid, process.start_ticks, process.boot_id)
    host.ondemand.end_if_lost(record, ref)
    if record.pager is not None:
        host.pager_watch.begin()
    return host.driver.adopt(record.id, ref, host.memory_file(record), host.shape(record))


def _of_another_boot(record: SandboxRecord) -> bool:
    return record.process is not None and record.process.boot_id != boot_id()


def _drop_capture(
    host: Host, record: SandboxRecord, machine: QemuMachine, operation: OperationRecord
) -> None:
    """A capture that was not committed: keep what the next one must add, and nothing else."""
    assert operation.snapshot is not None
    files = CaptureFiles(host.home, operation.snapshot)
    mark, unmerged = _mark(host, record), host.home.buffers / f"{record.id}.unmerged"
    if operation.verb == "pause":  # it never re-arms, so it has made nobody forget anything
        if mark.exists() and mark.read_text() == operation.snapshot:
            mark.unlink()
    elif (info := _sealed(files)) is not None:
        if info.captured_pages <= info.capacity:
            files.buffer.rename(unmerged)
        else:  # what spilled goes with the capture: by the mark, the next one compares all of RAM
            unmerged.unlink(missing_ok=True)
    files.buffer.unlink(missing_ok=True)
    files.raw_state.unlink(missing_ok=True)
    remove_tree(files.directory)
    _adopt_overlays(host, record, machine)


def _finish_capture(host: Host, record: SandboxRecord, machine: QemuMachine) -> None:
    """A save that was committed: what it left behind is of no use to anybody."""
    forget_failures(host, record)
    _adopt_overlays(host, record, machine)


def _mark(host: Host, record: SandboxRecord) -> Path:
    return host.home.sandbox(record.id) / "capture.mark"


def forget_failures(host: Host, record: SandboxRecord) -> None:
    """What failed captures left for the next one, which will not come or needs none of it."""
    _mark(host, record).unlink(missing_ok=True)
    (host.home.buffers / f"{record.id}.unmerged").unlink(missing_ok=True)


def _sealed(files: CaptureFiles) -> _core.CaptureInfo | None:
    """What the buffer says of itself, where it was sealed: re-arming may have begun."""
    try:
        info = _core.capture_info(str(files.buffer))
    except DiapauseError:
        return None
    return info if info.sealed else None


def _adopt_overlays(host: Host, record: SandboxRecord, machine: QemuMachine) -> None:
    """Which overlay a disk writes to is the VMM's to say; others that nobody knows are removed."""
    directory = host.home.sandbox(record.id)
    for index, names in enumerate(record.overlays):
        top = top_node(machine, index)
        for path in directory.glob(f"disk{index}.*.qcow2"):
            if path.name in names:
                continue
            if node_name(index, path) == top:
                names.append(path.name)
            else:
                path.unlink()
    host.catalog.put_sandbox(record)


def _take_up(host: Host, record: SandboxRecord, machine: QemuMachine) -> None:
    """A guest goes on under this daemon; one that stands and that nobody owns is thawed.

    One that was frozen by its row stands, whatever was done to it meanwhile.
    """
    if record.id in host.guests:  # it never left; its end is watched already
        if not record.frozen:
            thaw_if_it_stands(machine)
        _put_alive(host, record)
        return
    status = machine.status()
    if status in ("shutdown", "panicked"):
        machine.kill()
        host.end(record, "guest-panic" if status == "panicked" else "guest-shutdown")
        return
    if record.frozen:
        machine.stop()
    elif status == "paused":
        log.warning("sandbox %s stood frozen and nobody owned it: thawed", record.id)
        machine.thaw()
        host.event("thawed", record.id, cause="it stood frozen and nobody owned it")
    _put_alive(host, record)
    guest = Guest(record.id, host.loop)
    guest.machine = machine
    host.guests[record.id] = guest
    guest.arm(host.guest_ended, host.guest_stalled, host.guest_stopped)
    if record.agent and not record.frozen:  # a frozen one answers nobody
        host.watch(lambda: _greet(guest))


def _put_alive(host: Host, record: SandboxRecord) -> None:
    record.state = "frozen" if record.frozen else "running"
    host.catalog.put_sandbox(record)


def _greet(guest: Guest) -> None:
    """A new link: the last daemon's sessions are detached in the guest."""
    try:
        guest.reconnect(AGENT_READY_S)
    except DiapauseError as error:
        log.warning("adopting %s: %s", guest.sandbox, error)


def ended_again(host: Host, record: SandboxRecord) -> None:
    """A cold resume that did not come to its end: the row still says how it ended before."""
    own_overlays_back(host, record)
    by_itself = (record.reason or "").startswith("guest-")
    record.state = "stopped" if by_itself else "failed"
    host.ondemand.ended(record)
    record.process, record.root, record.pager, record.cold_base = None, None, None, None
    host.catalog.put_sandbox(record)


def own_overlays_back(host: Host, record: SandboxRecord) -> None:
    """The row names a sandbox's own overlays: a cold resume that stood on a snapshot (`root`) may
    have set them aside, and fresh ones over that snapshot are nobody's."""
    directory, own = host.home.sandbox(record.id), [*chain(*record.overlays)]
    for path in map(directory.joinpath, own):
        if not path.exists() and set_aside(path).exists():
            set_aside(path).rename(path)
    if record.root is not None:
        for path in directory.glob("disk*.qcow2"):
            if path.name not in own:
                path.unlink()


def set_aside(overlay: Path) -> Path:
    """Where an overlay is kept when its sandbox was booted without it."""
    return overlay.with_name(f"{overlay.name}.damaged")


def settle_paused(host: Host, record: SandboxRecord) -> None:
    """The row: paused at its snapshot; nothing of what ran before is left."""
    guest = host.guests.pop(record.id, None)
    if guest is not None:  # of a pause under this daemon that could not be finished
        host.parked[record.id] = guest.link
        if guest.machine is not None:
            guest.machine.close()
    directory = host.home.sandbox(record.id)
    for path in directory.glob("disk*.qcow2"):
        path.unlink()
    forget_failures(host, record)
    host.ondemand.ended(record)
    record.state, record.process = "paused", None
    record.root, record.pager, record.cold_base = None, None, None
    record.overlays, record.captures, record.tracker = [], 0, False
    record.frozen = False
    host.catalog.put_sandbox(record)
