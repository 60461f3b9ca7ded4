"""Guests whose memory and disks the pager serves.

What becomes of such a guest: it runs; or an access waits (`stalled`, in `inspect`); or its VMM was
killed, by the pager since a blob could not be served, or by us since pager and keeper are both
dead: what its next access would get nobody can say. In both cases its row says why, and its
snapshot can be resumed again.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from diapause.driver.process import Pidfd
from diapause.errors import DiapauseError, PagerUnavailable
from diapause.limits import VMM_EXIT_S
from diapause.model import Stalled
from diapause.pager import process
from diapause.pager.client import Pager
from diapause.sandbox import residence
from diapause.sandbox.admit import available_memory
from diapause.snapshot.passing import Passing
from diapause.snapshot.served import Served
from diapause.snapshot.traces import Traces
from diapause.store.boot import boot_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from diapause.catalog import Catalog, SandboxRecord, SnapshotRecord
    from diapause.driver.base import ProcessRef
    from diapause.snapshot.flats import FlatStore
    from diapause.snapshot.leases import Leases
    from diapause.store.home import Home
    from diapause.store.templates import Templates

log = logging.getLogger("diapause.ondemand")
LOST = "its pager and the keeper have ended"
VARIABLE, MODES = "DIAPAUSE_MEMORY_MODE", ("ondemand", "copy")


def _mode() -> str:
    """What the daemon was told of whoever doesn't say; else on demand."""
    told = os.environ.get(VARIABLE, MODES[0])
    if told not in MODES:
        log.warning("%s is %r and not one of %s: it is %s", VARIABLE, told, MODES, MODES[0])
        return MODES[0]
    return told


class Ondemand:
    """The pager of one home and who runs on it."""

    def __init__(
        self, home: Home, catalog: Catalog, templates: Templates, leases: Leases, flats: FlatStore
    ) -> None:
        self._home, self._catalog = home, catalog
        self._mode = _mode()
        self._possible = False  # as far as was tried
        self.pager = Pager(home)
        self.passing = Passing(flats, self.pager)
        flats.on_gone = self.passing.take_back
        self.served = Served(home, catalog, templates, leases, self.pager)
        self.traces = Traces(home, catalog, self.pager)

    def wanted(self, asked: Literal["ondemand", "copy"] | None) -> bool:
        """Whether memory is served on demand: what was asked for, else what the daemon was told."""
        return (asked or self._mode) == "ondemand"

    def usual(self) -> bool:
        """Whether guests that nobody says otherwise of are served on demand here; it is tried until
        it was possible once. Who asks only wants to know what to have ready."""
        if self.wanted(None) and not self._possible:
            self._possible = self.pid() is not None or process.probe() is None
        return self._possible

    def serve(self, record: SandboxRecord, source: SnapshotRecord) -> dict[str, Path]:
        """The files of a snapshot, by device; the row says whose they are.

        Raises PagerUnavailable.
        """
        self.served.check(source)
        pair = self.pager.pair(start=True)
        names = self.served.files(source, pair.instance)
        self.passing.offer(source, names, pair.instance)
        record.pager = pair.instance
        self._catalog.put_sandbox(record)
        if record.cold_base is None:  # else nobody wants its memory
            self.traces.replay(source, available_memory() // 4)
        return {device: self.pager.path(name) for device, name in names.items()}

    def make_ready(self, source: SnapshotRecord, *, whole: bool) -> None:
        """The files of a snapshot that a guest is about to be put back to; with `whole` nothing of
        it is damaged, else that is seen when the guest touches it.

        Raises PagerUnavailable; BlobMissing and BlobDamaged.
        """
        self.served.check(source)
        self.served.files(source, self.pager.pair(start=True).instance)
        if whole:
            self.served.verify(source, [device.name for device in source.devices])

    def attach(self, record: SandboxRecord, source: SnapshotRecord | None, vmm: ProcessRef) -> None:
        """From here on the pager knows whose access it answers; raises PagerUnavailable."""
        devices = [f"disk{i}" for i in range(len(record.disks_bytes))]
        if record.cold_base is None:
            devices.append("memory")
        pidfd = Pidfd(vmm)
        with contextlib.closing(pidfd):
            if pidfd.fileno() < 0:
                raise PagerUnavailable(cause="the VMM has ended")
            files = [f"{record.cold_base or record.root}.{device}" for device in devices]
            self.pager.attach(record.id, files, pidfd.fileno())
        if source is not None:
            self.traces.begin(record.id, source)

    def ended(self, record: SandboxRecord) -> str | None:
        """A VMM is gone: let go of it. Why it was killed, where that was over its memory."""
        self.traces.drop(record.id)
        if record.pager is None:
            return None
        if record.process is not None and record.process.boot_id != boot_id():
            return None  # the host went down, and the pair with it
        try:
            if self.pager.instance() != record.pager:
                return LOST
            killed = self.pager.detach(record.id)
        except PagerUnavailable as error:
            log.warning("%s: whether the pager ended it is not known: %s", record.id, error)
            return None
        return f"{killed['blob']} could not be served: {killed['cause']}" if killed else None

    def killed(self, record: SandboxRecord) -> dict[str, Any] | None:
        """Why the pager killed a sandbox's VMM, where it did and it is not let go of yet."""
        try:
            killed: dict[str, Any] | None = self.pager.seen(record.id)["killed"]
        except PagerUnavailable as error:
            log.warning("%s: whether the pager ended it is not known: %s", record.id, error)
            return None
        return killed

    def end_if_lost(self, record: SandboxRecord, vmm: ProcessRef) -> None:
        """End a VMM whose pager and keeper are both dead."""
        if not self.lost([record]):
            return
        pidfd = Pidfd(vmm)
        pidfd.kill()
        pidfd.wait(VMM_EXIT_S)
        pidfd.close()

    def lost(self, records: Sequence[SandboxRecord]) -> list[SandboxRecord]:
        """Those whose pair is not there any more. One that only does not answer is there."""
        if not any(record.pager for record in records):
            return []
        try:
            there = self.pager.instance()  # after their rows were read: a new pair has no old ones
        except PagerUnavailable as error:
            log.warning("%s", error)
            return []
        return [record for record in records if record.pager not in (None, there)]

    def seen(self, record: SandboxRecord) -> dict[str, Any] | None:
        """What the pager counted of a sandbox, where it serves it and answers."""
        found = self._counted(record)
        if found is not None and "files" in found and record.process is not None:
            residence.measure(self._home, record.process.pid, found)
            if record.root is not None and record.cold_base is None:
                found["prefetch"] = self.traces.used(record.id, record.root)
        return found

    def on_flats(self, snapshot: str) -> bool:
        """Whether a VMM runs on files that are passed through to a snapshot's flat ones."""
        for record in self._catalog.sandboxes():
            if record.root == snapshot and record.pager is not None:
                files = (self.seen(record) or {}).get("files")
                if files is None or any(file.get("passthrough", True) for file in files):
                    return True  # also where nobody can say
        return False

    def _counted(self, record: SandboxRecord) -> dict[str, Any] | None:
        if record.pager is None:
            return None
        try:
            return self.pager.seen(record.id)
        except PagerUnavailable as error:
            return {"error": error.message}

    def stalled(self) -> dict[str, Stalled]:
        """The sandboxes that wait for a blob right now."""
        return {
            sandbox: Stalled(blob=why["blob"], cause=why["cause"], waited_ms=why["waited_ms"])
            for sandbox, why in self.totals().get("stalled", {}).items()
        }

    def totals(self) -> dict[str, Any]:
        """What the pager counted of all files; nothing where it does not run or answer."""
        try:
            return self.pager.totals() if self.pager.instance() is not None else {}
        except PagerUnavailable as error:
            log.info("what the pager counted is not known: %s", error)
            return {}

    def faults(self, record: SandboxRecord) -> dict[str, int]:
        """Reads of a sandbox's files that were answered so far, by where their bytes came from.

        Forks that run on the same files share the count.
        """
        counts: Counter[str] = Counter()
        for file in (self._counted(record) or {}).get("files", []):
            for origin, reads in file["seen"]["reads"].items():
                counts[origin] += reads["count"]
        return dict(counts)

    def pid(self) -> int | None:
        """The pager's process, where it runs."""
        try:
            return self.pager.pair(start=False).pid
        except PagerUnavailable:
            return None

    def adopt(self) -> None:
        """Take up the files that an earlier daemon left, if there is a pager."""
        try:
            self.traces.sweep()
            if self.pager.instance() is None:
                self.served.sweep()
            else:
                self.served.adopt()
        except (DiapauseError, OSError) as error:
            log.info("no files of a pager are taken up: %s", error)

    def forget(self, snapshots: Iterable[str]) -> None:
        """Snapshots are gone: so are their traces and files, where a pager has any."""
        snapshots = list(snapshots)
        self.traces.forget(snapshots)
        try:
            if self.pager.instance() is not None:
                for snapshot in snapshots:
                    self.served.forget(snapshot)
        except PagerUnavailable as error:  # the next daemon finds them
            log.warning("files of snapshots that are gone stay: %s", error)

    def stand_back(self) -> None:
        """Let go of captures of removed snapshots that no sandbox stands on, for a collection."""
        sandboxes, snapshots = self._catalog.everything()
        used = {one for row in sandboxes for one in (row.snapshot, row.root, row.cold_base)}
        removed = {row.id for row in snapshots if row.removed_at is not msgspec.UNSET}
        self.forget((removed - used) & self.served.on_captures())

    def close(self) -> None:
        """Let go of it; it goes on where guests run on it, and ends where none does."""
        self.served.close()
        try:
            self.pager.stop()
        except PagerUnavailable as error:
            log.info("the pager is not stopped: %s", error)
        self.pager.close()
