"""check --repair: what can be made again is, and what can't is said in the rows.

    check      read everything
    builds     a damaged build is packed again from flat files that have its pages
    files      damaged flat files and digests are dropped and made again; manifests are written anew
    rows       what is left is read again; a snapshot that lacks it becomes failed, with the
               blob's name

A build is named by what it holds, so one that was made again is that build or gets no name. A
snapshot that failed keeps its files: whoever brings the blob back from another copy can still read
it. What could not be read, since descriptors, memory or permission were wanting, costs nobody
anything. A kill at any step leaves damage that the next check finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec

from diapause import _core
from diapause.errors import BlobDamaged, BlobMissing, DiapauseError
from diapause.sandbox.upkeep import world
from diapause.sandbox.upkeep.check import check, look_again
from diapause.sandbox.upkeep.spare import sources_of
from diapause.sandbox.verb import Verb
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.files import replace_file, storage_errors

if TYPE_CHECKING:
    from diapause.catalog import SnapshotRecord
    from diapause.model import CheckAnswer, Damage
    from diapause.sandbox.host import Host


class Repair(Verb):
    """One check that mends; it belongs to no sandbox."""

    name = "repair"
    steps: ClassVar[tuple[str, ...]] = ("check", "builds", "files", "rows")
    sure_from: ClassVar[str] = "builds"

    def __init__(self, host: Host) -> None:
        super().__init__(host, "")
        self.found: CheckAnswer

    def do_check(self) -> None:
        """Read everything."""
        self.found = check(self.host)

    def do_builds(self) -> None:
        """Before the flat files that are made of them."""
        with self.host.gate.publishing():
            for damage in self.found.damage:
                if damage.blob.startswith("builds/"):
                    damage.repaired = self._build(damage)

    def _build(self, damage: Damage) -> str | None:
        """Packed again where enough of its pages lie elsewhere; the cause says so where not."""
        build, home = damage.blob.removeprefix("builds/"), self.host.home
        sources = sources_of(self.host, build)
        try:
            made = _core.rebuild_build(build, sources, str(home.builds), str(home.tmp))
        except (BlobDamaged, BlobMissing) as error:
            damage.cause += f"; it can't be made again: {error.fields.get('cause', error)}"
            return None
        names = ", ".join(str(Path(flat).relative_to(home.root)) for _, _, flat, _ in sources)
        return f"{made.packed_frames} frames packed again from {names or 'what is left of it'}"

    def do_files(self) -> None:
        """What can be made from what is whole."""
        with storage_errors("a repair", self.host.home.root):
            for damage in self.found.damage:
                if damage.blob.startswith("snapshots/") and damage.blob.endswith("/manifest.json"):
                    damage.repaired = self._manifest(damage.snapshots[0])
            for damage in self.found.damage:  # after the manifests, which they are made by
                if damage.blob.startswith("flat/"):
                    damage.repaired = self._flat(damage.blob.split("/")[1])

    def _flat(self, snapshot: str) -> str | None:
        """Dropped, and made again where its snapshot is whole; not below a running guest."""
        place, record = self.host.home.flat_of(snapshot), self.host.catalog.snapshot(snapshot)
        held = world.held_inodes(self.host.driver.all_processes())
        if held is None or world.inodes_in(place) & held or self.host.ondemand.on_flats(snapshot):
            return None
        self.host.flats.drop(snapshot)
        if record is None:
            return "dropped"
        try:
            self.host.flats.ensure(record)
        except DiapauseError as error:
            return f"dropped; not made again: {error.message}"
        return "made again"

    def _manifest(self, snapshot: str) -> str | None:
        record = self.host.catalog.snapshot(snapshot)
        place = self.host.home.snapshot(snapshot)
        if record is None or not place.exists():
            return None
        path = place / "manifest.json"
        replace_file(path, manifest_bytes(record), self.host.home.tmp, sync=True)
        path.chmod(0o400)
        return "written again from the catalog"

    def do_rows(self) -> None:
        """What is lost is said, by the blob's name; there is no way back, so it is read again."""
        left = [damage for damage in self.found.damage if damage.repaired is None]
        again = look_again(self.host, [damage for damage in left if damage.snapshots])
        for damage in self.found.damage:
            if damage.repaired is not None:
                self.host.event("repaired", blob=damage.blob, how=damage.repaired)
            elif damage.snapshots and self._is_lost(damage, again.get(damage.blob)):
                for snapshot in damage.snapshots:
                    self._lose(snapshot, damage)

    def _is_lost(self, damage: Damage, again: Damage | None) -> bool:
        """Whether a blob was read twice, and was not whole the second time."""
        if again is None:
            damage.repaired = "not needed: it was whole when it was read again"
        elif again.unread or damage.unread:
            damage.cause, damage.missing, damage.unread = again.cause, again.missing, again.unread
        return again is not None and not again.unread

    def _lose(self, snapshot: str, damage: Damage) -> None:
        error = BlobDamaged(blob=damage.blob, cause=damage.cause).to_dict()

        def fail(found: SnapshotRecord) -> SnapshotRecord:
            if found.state == "failed":
                return found
            return msgspec.structs.replace(found, state="failed", error=error)

        self.host.catalog.change_snapshot(snapshot, fail, durable=True)
        for sandbox in damage.sandboxes:
            with self.host.locks.hold(sandbox):
                record = self.host.catalog.sandbox(sandbox)
                if record is not None and record.state == "paused" and record.snapshot == snapshot:
                    record.error = error
                    self.host.catalog.put_sandbox(record)
