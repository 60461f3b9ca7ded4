"""snapshot rm: nobody sees the snapshot any more; its files stay until gc.

Refused for a snapshot that a paused sandbox is to be resumed from. A guest that runs on it, or a
capture over it that is not packed yet, keeps its files, not its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from diapause.catalog import SnapshotRecord, now
from diapause.errors import InUse
from diapause.sandbox.refer import labels
from diapause.sandbox.upkeep.garbage import is_removed
from diapause.sandbox.verb import Verb

if TYPE_CHECKING:
    from diapause.catalog import Catalog, SandboxRecord
    from diapause.sandbox.host import Host

# The states of a sandbox whose guest is nowhere but in its snapshot.
_IN_ITS_SNAPSHOT = ("pausing", "paused", "resuming")


def check_unused(catalog: Catalog, record: SnapshotRecord) -> None:
    """Refuse to remove what a sandbox is to be resumed from."""
    users = [
        sandbox
        for sandbox in catalog.sandboxes()
        if sandbox.snapshot == record.id and sandbox.state in _IN_ITS_SNAPSHOT
    ]
    if users:
        one = users[0].name or users[0].id
        advice = f"Resume it, or remove it first: `diapause rm {one}`."
        what = f"Snapshot {record.name or record.id}"
        raise InUse(what=what, users=f"paused sandbox {labels(users)}", advice=advice)


def kept_for(sandboxes: list[SandboxRecord], snapshots: list[SnapshotRecord], one: str) -> str:
    """Who keeps the files of a removed snapshot from gc, in words; empty where nobody does."""
    guests = [row for row in sandboxes if one in (row.snapshot, row.root, row.cold_base)]
    captures = [row for row in snapshots if row.parent == one and row.state == "captured"]
    words = []
    if guests:
        words.append(f"sandbox {labels(guests)} stands on it")
    if captures:
        words.append(f"snapshot {labels(captures)} is not packed yet")
    return " and ".join(words)


class RemoveSnapshot(Verb):
    """Remove one snapshot."""

    name = "snapshot-rm"
    steps: ClassVar[tuple[str, ...]] = ("mark",)

    def __init__(self, host: Host, record: SnapshotRecord) -> None:
        super().__init__(host, "", record.id)
        self.record = record

    def do_mark(self) -> None:
        """The row: removed, its name free. From here on only gc looks at it."""

        def mark(found: SnapshotRecord) -> SnapshotRecord:
            if is_removed(found):
                return found
            return msgspec.structs.replace(found, name=None, removed_at=now())

        self.host.catalog.change_snapshot(self.record.id, mark, durable=True)
