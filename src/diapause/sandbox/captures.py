"""Snapshots taken, and what is done with them behind the verbs."""

from __future__ import annotations

import contextlib
from concurrent.futures import CancelledError
from functools import partial
from typing import TYPE_CHECKING, Any

from diapause.errors import Cancelled, DiapauseError, NotEnoughSpace, StorageFailed
from diapause.limits import PACK_S
from diapause.operation import wait_for
from diapause.sandbox import admit, views
from diapause.sandbox.network import CUT_BY_PAUSE, has_network
from diapause.sandbox.part import Part
from diapause.sandbox.pause import Pause, Save
from diapause.sandbox.refer import find_sandbox
from diapause.sandbox.states import require
from diapause.store.files import fsync_path, storage_errors

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.model import CaptureAnswer, CaptureRequest

_PACK_AGAIN_S = 5.0


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

    def pack_behind(self, snapshot: str, pause_s: float = _PACK_AGAIN_S) -> Any:
        """Pack, and then, if its sandbox still waits on it, have its flat files ready.

        What the host refused is asked again after a pause: until then a capture is not durable.
        """

        def work() -> None:
            try:
                self._sync_names(snapshot)
                packed = self.host.packer.pack(snapshot)
            except DiapauseError as error:
                self._note_failure(snapshot, error)
                if isinstance(error, NotEnoughSpace | StorageFailed) and not self.host.closing:
                    again = partial(self.pack_behind, snapshot, min(2 * pause_s, PACK_S))
                    self.host.later(pause_s, again)
                raise
            record = self.catalog.sandbox(packed.sandbox)
            waits = record and record.state == "paused" and record.snapshot == snapshot
            if waits and not self.host.ondemand.usual():  # else nobody asks for flat files
                self.host.flats.ensure(packed)

        return self.host.behind(f"pack {snapshot}", work)

    def _sync_names(self, snapshot: str) -> None:
        """A save has its guest write to overlays with new names: they are durable with its row."""
        record = self.catalog.snapshot(snapshot)
        if record is None:
            return
        with (
            storage_errors("overlays", self.host.home.root),
            contextlib.suppress(FileNotFoundError),  # it was removed
        ):
            fsync_path(self.host.home.sandbox(record.sandbox))

    def _note_failure(self, snapshot: str, error: DiapauseError) -> None:
        def note(now: SnapshotRecord) -> SnapshotRecord:
            if now.state == "captured":
                now.error = error.to_dict()
            return now

        self.catalog.change_snapshot(snapshot, note, durable=True)
