"""Snapshots taken, and what is done with them behind the verbs."""

from __future__ import annotations

import contextlib
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from diapause.errors import Cancelled, DiapauseError
from diapause.limits import PACK_S
from diapause.operation import wait_for
from diapause.sandbox import admit, views
from diapause.sandbox.network import CUT_BY_PAUSE, has_network
from diapause.sandbox.part import Part
from diapause.sandbox.pause import Pause, Save
from diapause.sandbox.refer import find_sandbox
from diapause.sandbox.states import require

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.model import CaptureAnswer, CaptureRequest


class Captures(Part):
    """`pause` and `snapshot save`."""

    def pause(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Save everything and free the host's memory."""
        admit.check_snapshot_name(self.catalog, request.name)
        found = find_sandbox(self.catalog, reference)
        with self.host.locks.hold(found.id):
            record = self.reread(found)
            if record.state == "paused":
                return views.paused_already(self.catalog, record)
            require(record, "pause", "running", "frozen")
            verb = Pause(self.host, record, self.guest(record), request)
            self.capture(verb)
        if has_network(record):
            verb.notes.append(CUT_BY_PAUSE)
        return self.captured(verb)

    def save(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Take a snapshot of a sandbox that goes on."""
        admit.check_snapshot_name(self.catalog, request.name)
        found = find_sandbox(self.catalog, reference)
        with self.host.locks.hold(found.id):
            verb = self.save_under_lock(self.reread(found), request)
        return self.captured(verb)

    def save_under_lock(self, record: SandboxRecord, request: CaptureRequest) -> Save:
        """A save by whoever holds the sandbox."""
        require(record, "snapshot save", "running", "frozen")
        verb = Save(self.host, record, self.guest(record), request)
        self.capture(verb)
        return verb

    def capture(self, verb: Pause | Save) -> None:
        """Take it; what was committed is packed, whatever came after."""
        try:
            verb.execute()
        except BaseException:
            if verb.committed and verb.snapshot is not None:
                self.pack_behind(verb.snapshot)  # the snapshot is whole, whatever came after
            raise

    def captured(self, verb: Pause | Save) -> CaptureAnswer:
        """The answer of a capture that is whole; its packing goes on behind."""
        answer = verb.answer()
        packed = self.pack_behind(answer.snapshot)
        if answer.dirty_source == "compared":
            # Without it the count is an upper bound; the capture itself is done.
            with contextlib.suppress(TimeoutError, CancelledError, Cancelled):
                wait_for(packed, PACK_S)
            answer.dirty_pages = views.changed_pages(self.catalog, answer)
        return answer

    def pack_behind(self, snapshot: str) -> Any:
        """Pack, and then, if its sandbox still waits on it, have its flat files ready."""

        def work() -> None:
            try:
                packed = self.host.packer.pack(snapshot)
            except DiapauseError as error:
                self._note_failure(snapshot, error)
                raise
            record = self.catalog.sandbox(packed.sandbox)
            if record and record.state == "paused" and record.snapshot == snapshot:
                self.host.flats.ensure(packed)

        return self.host.behind(f"pack {snapshot}", work)

    def _note_failure(self, snapshot: str, error: DiapauseError) -> None:
        def note(now: SnapshotRecord) -> SnapshotRecord:
            if now.state == "captured":
                now.error = error.to_dict()
            return now

        self.catalog.change_snapshot(snapshot, note, durable=True)
