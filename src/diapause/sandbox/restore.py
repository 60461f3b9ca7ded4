"""restore: a sandbox is put back to a snapshot.

    ready    the snapshot's files are there: nothing is given up before; with `discard` all of it
             is read and verified, else only what the guest touches, later
    save     what runs is paused, or its guest is given up (`discard`)
    point    the row: paused at the snapshot; from here on there is no way back
    end      the VMM, where it still runs
    publish  what belonged to the state before is removed; its sessions end as cut

Whoever asked resumes it then. A kill leaves the sandbox as it was, or paused: at what was saved of
it, or at the snapshot.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, ClassVar

import msgspec

from diapause.errors import DiapauseError, PagerUnavailable
from diapause.sandbox.recovery import settle_paused
from diapause.sandbox.remove import end_orphan
from diapause.sandbox.verb import Verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.restore")


class Restore(Verb):
    """Put one sandbox back; it is paused afterwards."""

    name = "restore"
    steps: ClassVar[tuple[str, ...]] = ("ready", "save", "point", "end", "publish")
    sure_from: ClassVar[str] = "point"

    def __init__(
        self,
        host: Host,
        record: SandboxRecord,
        target: SnapshotRecord,
        save: Callable[[], SandboxRecord] | None,
    ) -> None:
        super().__init__(host, record.id, target.id)
        self.record, self.target, self.pause = record, target, save
        self.pointed = False

    def do_ready(self) -> None:
        """The files and the device state of where it goes; whole, where there is no way back."""
        host = self.host
        with host.leases.hold(self.target.id):
            self.target = host.catalog.snapshot(self.target.id) or self.target
            host.flats.verify_small(self.target)
            host.flats.device_state(self.target)
            if not host.ondemand.wanted(None):
                host.flats.ensure(self.target)
                return
            try:
                host.ondemand.make_ready(self.target, whole=self.pause is None)
            except PagerUnavailable as error:  # the resume says so
                log.info("restore of %s: %s", self.sandbox, error)
                host.flats.ensure(self.target)

    def do_save(self) -> None:
        """Its present state, unless nobody wants it."""
        if self.pause is not None:
            self.record = self.pause()

    def do_point(self) -> None:
        """The row: paused at the snapshot."""
        target = self.target
        self.record = msgspec.structs.replace(
            self.record, state="paused", snapshot=target.id, identity=target.identity,
            image=target.image, agent=target.agent, process=None, root=None, captures=0,
            overlays=[], tracker=False, frozen=False, cold=False, error=None, reason=None,
        )  # fmt: skip
        self.host.catalog.put_sandbox(self.record, durable=True)
        self.pointed = True

    def do_end(self) -> None:
        """The VMM of a guest that was given up."""
        guest = self.host.guests.pop(self.sandbox, None)
        cause = f"the sandbox was restored to snapshot {self.target.id}"
        if guest is not None:
            with contextlib.suppress(DiapauseError):
                guest.disarm()
            guest.cut(cause)
            if guest.machine is not None:
                guest.machine.kill()
        if (link := self.host.parked.pop(self.sandbox, None)) is not None:
            self.host.loop.call_soon_threadsafe(link.close, cause)
        end_orphan(self.host, self.sandbox)

    def do_publish(self) -> None:
        """Overlays and marks of the state before."""
        settle_paused(self.host, self.record)

    def undo(self, step: str, error: BaseException) -> None:
        """Before the row it is what it was; after it, recovery goes on to the end."""
        self.left_to_recovery = self.pointed
