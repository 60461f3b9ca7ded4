"""A part of the engine: what every one of them needs to find, read and make rows."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from diapause.catalog import SandboxRecord, now
from diapause.sandbox import admit
from diapause.sandbox.recovery import is_unsettled, settle
from diapause.sandbox.refer import find_snapshot, host_name
from diapause.sandbox.states import wrong_state
from diapause.sandbox.verb import new_id

if TYPE_CHECKING:
    from diapause.catalog import SnapshotRecord
    from diapause.sandbox.guests import Guest
    from diapause.sandbox.host import Host


class Part:
    """Some verbs of one home; its methods may be called from any worker thread."""

    def __init__(self, host: Host) -> None:
        self.host, self.catalog = host, host.catalog

    def reread(self, record: SandboxRecord) -> SandboxRecord:
        """The row as it is under the lock; what a verb could not finish is settled first."""
        found = self.catalog.sandbox(record.id)
        assert found is not None
        if is_unsettled(self.host, found):
            settle(self.host, found)
            found = self.catalog.sandbox(record.id)
            assert found is not None
        return found

    def guest(self, record: SandboxRecord) -> Guest:
        """The guest of a sandbox that runs under this daemon."""
        guest = self.host.guests.get(record.id)
        if guest is None:
            raise wrong_state(record, "this", "running under this daemon")
        return guest

    def snapshot(self, snapshot: str) -> SnapshotRecord:
        """One snapshot, by whatever it is named with."""
        return find_snapshot(self.catalog, snapshot)

    def snapshot_of(self, record: SandboxRecord) -> SnapshotRecord:
        """What a sandbox was last captured to or started from."""
        if record.snapshot is None:
            raise wrong_state(record, "fork", "running, or to have a snapshot")
        # It may have been removed: then it stays for this sandbox, and for nobody else.
        return self.catalog.snapshot(record.snapshot) or self.snapshot(record.snapshot)

    def new_record(
        self, name: str | None, image: str, memory_bytes: int, cpus: int
    ) -> SandboxRecord:
        """The row of a sandbox that is to be; nothing is written."""
        sandbox = new_id()
        return SandboxRecord(
            id=sandbox, name=name, state="creating", created_at=now(), image=image,
            memory_bytes=memory_bytes, cpus=cpus, disks_bytes=[],
            hostname=host_name(name or f"sandbox-{sandbox[:8]}"), machine_id=secrets.token_hex(16),
        )  # fmt: skip

    def put_new(self, record: SandboxRecord) -> None:
        """Write the row of a new sandbox; refuses a name that is taken."""
        admit.check_sandbox_name(self.catalog, record.name)
        self.catalog.put_sandbox(record)
