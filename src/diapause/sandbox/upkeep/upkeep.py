"""The verbs that keep a home in order, and those that look at snapshots without a guest."""

from __future__ import annotations

import threading

from diapause import _core
from diapause.errors import ImageNotFound, InvalidRequest, SnapshotLost, SnapshotNotFound
from diapause.guest import images
from diapause.limits import DIFF_EXTENTS_MAX
from diapause.model import (
    CheckAnswer,
    CheckRequest,
    DeviceDifference,
    DfAnswer,
    DiffAnswer,
    GcAnswer,
    GcRequest,
    ImageDetail,
    RemoveImageAnswer,
    RemoveSnapshotAnswer,
)
from diapause.sandbox.part import Part
from diapause.sandbox.refer import find_snapshot
from diapause.sandbox.upkeep import image_users, space, world
from diapause.sandbox.upkeep.check import check
from diapause.sandbox.upkeep.collect import Found, Gc
from diapause.sandbox.upkeep.forget import RemoveSnapshot, check_unused, kept_for
from diapause.sandbox.upkeep.repair import Repair
from diapause.snapshot.headers import Headers
from diapause.units import PAGE_SIZE


class Upkeep(Part):
    """`snapshot rm|verify|diff`, `image rm|inspect`, `gc`, `check`, `df`."""

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

    def inspect_image(self, name: str) -> ImageDetail:
        """All that is known of an image, and who needs it."""
        return image_users.detail(self.host, name)

    def remove_image(self, name: str) -> RemoveImageAnswer:
        """Remove an image that nobody needs; a damaged one too."""
        known = images.names(self.host.home)
        if name not in known:
            raise ImageNotFound(reference=name, candidates=", ".join(known) or "none")
        with self._one, self.host.reserve.room():
            image_users.RemoveImage(self.host, name).execute()
        return RemoveImageAnswer(removed=[name])

    def gc(self, request: GcRequest) -> GcAnswer:
        """Delete what nothing refers to; with `dry_run` only say what that is."""
        if request.dry_run:
            return Found(self.host, world.look(self.host)).answer(dry_run=True)
        with self.host.reserve.room():
            verb = Gc(self.host)
            verb.execute()
        return verb.answer()

    def check(self, request: CheckRequest) -> CheckAnswer:
        """Read everything, and with `repair` make again what can be."""
        if not request.repair:
            return check(self.host)
        verb = Repair(self.host)
        verb.execute()
        return verb.found

    def verify(self, reference: str) -> CheckAnswer:
        """Read all that one snapshot is made of."""
        record = find_snapshot(self.catalog, reference)
        if record.state == "failed":
            cause = (record.error or {}).get("message", "unknown")
            raise SnapshotLost(snapshot=record.id, cause=cause)
        return check(self.host, record)

    def df(self) -> DfAnswer:
        """What takes the space of the home."""
        return space.measure(self.host)

    def diff(self, old: str, new: str) -> DiffAnswer:
        """What differs between two snapshots, device by device, by their headers alone."""
        first, second = find_snapshot(self.catalog, old), find_snapshot(self.catalog, new)
        sizes = [[(d.name, d.size_bytes) for d in row.devices] for row in (first, second)]
        if sizes[0] != sizes[1]:
            cause = "their devices are not of the same names and sizes"
            raise InvalidRequest(what=f"Comparing {first.id} with {second.id}", cause=cause)
        host = self.host
        found = []
        with Headers(host.home, self.catalog, host.templates, host.leases) as headers:
            for name, _ in sizes[0]:
                before, after = headers.of(first, name), headers.of(second, name)
                seen = _core.header_difference(
                    str(before.path), before.digest, str(after.path), after.digest,
                    DIFF_EXTENTS_MAX,
                )  # fmt: skip
                found.append(
                    DeviceDifference(
                        name=name,
                        pages=seen.changed_pages,
                        bytes=seen.changed_pages * PAGE_SIZE,
                        zeroed_pages=seen.zeroed_pages,
                        extent_count=seen.extent_count,
                        extents=seen.extents,
                    )
                )
        return DiffAnswer(old=first.id, new=second.id, devices=found)
