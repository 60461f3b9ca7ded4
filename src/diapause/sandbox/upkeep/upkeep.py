"""The verbs that keep a home in order."""

from __future__ import annotations

import threading

from diapause.errors import SnapshotNotFound
from diapause.model import GcAnswer, GcRequest, RemoveSnapshotAnswer
from diapause.sandbox.part import Part
from diapause.sandbox.refer import find_snapshot
from diapause.sandbox.upkeep import world
from diapause.sandbox.upkeep.collect import Found, Gc
from diapause.sandbox.upkeep.forget import RemoveSnapshot, check_unused, kept_for


class Upkeep(Part):
    """`snapshot rm`, `gc`."""

    _one = threading.Lock()  # a removal looks and then writes

    def remove_snapshot(self, reference: str) -> RemoveSnapshotAnswer:
        """Remove a snapshot; its files stay until gc. One that is gone already is a success."""
        try:
            record = find_snapshot(self.catalog, reference)
        except SnapshotNotFound:
            if self.catalog.snapshot(reference) is None:
                raise
            return RemoveSnapshotAnswer(removed=[], already=[reference])
        with self._one, self.host.reserve.room():
            check_unused(self.catalog, record)
            RemoveSnapshot(self.host, record).execute()
        why = kept_for(*self.catalog.everything(), record.id)
        notes = [f"the files of {record.id} stay until later: {why}"] if why else []
        return RemoveSnapshotAnswer(removed=[record.id], already=[], notes=notes)

    def gc(self, request: GcRequest) -> GcAnswer:
        """Delete what nothing refers to; with `dry_run` only say what that is."""
        if request.dry_run:
            return Found(self.host, world.look(self.host)).answer(dry_run=True)
        with self.host.reserve.room():
            verb = Gc(self.host)
            verb.execute()
        return verb.answer()
