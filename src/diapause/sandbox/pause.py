"""pause: capture, then let go of the VMM. save: capture, and the guest goes on.

A pause keeps its VMM, stopped, until the asked durability is reached; any failure before that thaws
the guest where it is.
"""

from __future__ import annotations

from typing import ClassVar

from diapause.sandbox.capture import Capture


class Save(Capture):
    """A snapshot of a guest that goes on."""

    name = "save"
    goes_on = True


class Pause(Capture):
    """A snapshot, and the host's memory back."""

    name = "pause"
    goes_on = False
    steps: ClassVar[tuple[str, ...]] = (
        "prepare", "freeze", "keep", "commit", "release", "publish",
    )  # fmt: skip

    def do_prepare(self) -> None:
        """As for a save; the row says that it is being paused."""
        super().do_prepare()
        self.record.state = "pausing"
        self.host.catalog.put_sandbox(self.record)

    def do_release(self) -> None:
        """End the VMM: the capture is whole. Sessions wait for the resume."""
        self.guest.disarm()
        self.guest.detach()
        self.host.ondemand.traces.settle(self.sandbox)
        self.machine.kill()
        self.host.ondemand.ended(self.record)

    def do_publish(self) -> None:
        """The row: paused, nothing of it runs."""
        record = self.record
        for names in record.overlays:
            self._drop_overlays(names)
        record.state, record.process = "paused", None
        record.root, record.pager, record.cold_base = None, None, None
        record.captures, record.overlays, record.tracker = 0, [], False
        record.frozen = False
        self.host.guests.pop(record.id, None)
        self.host.parked[record.id] = self.guest.link
        self.host.catalog.put_sandbox(record, durable=self.request.durability != "process")

    def undo(self, step: str, error: BaseException) -> None:
        """Before the commit the guest goes on; after it the pause is finished by recovery."""
        if self.committed:
            # Its VMM must never run again: the snapshot's disks are the overlays it has open.
            self.left_to_recovery = True
            return
        super().undo(step, error)
        self.record.state = "frozen" if self.record.frozen else "running"
        self.host.catalog.put_sandbox(self.record)
