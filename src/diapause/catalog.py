"""The catalog: the rows of one home, and beside them its journal.

A row never says more than the files hold: files first, then the row. How far a write reaches is
`database`'s; `journal` has the steps of every verb; `migrations` has the tables.
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from diapause import events
from diapause.database import Database, now
from diapause.errors import BlobDamaged, NameInUse
from diapause.journal import Journal, note_event
from diapause.migrations import forget_copies, migrate
from diapause.model import PortForward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "Catalog",
    "DeviceRecord",
    "Identity",
    "Process",
    "SandboxRecord",
    "SnapshotRecord",
    "now",
]


class Process(msgspec.Struct, frozen=True):
    """A VMM process as a row keeps it."""

    pid: int
    start_ticks: int
    boot_id: str


class Identity(msgspec.Struct, frozen=True):
    """The VMM that a machine or a snapshot belongs to."""

    kind: str
    version: str
    machine: str
    cpu: str
    accelerator: str
    processor: str = ""


class SandboxRecord(msgspec.Struct, kw_only=True):
    """A sandbox, whole; `state` is one of `model.SandboxState` or `removed`."""

    id: str
    name: str | None
    state: str
    created_at: str
    image: str
    memory_bytes: int
    cpus: int
    disks_bytes: list[int]
    hostname: str
    machine_id: str
    identity: Identity | None = None
    process: Process | None = None
    snapshot: str | None = None  # its last completed capture, or what it was started from
    root: str | None = None  # the flat directory whose files the running process maps
    pager: str | None = None  # the pair that serves its memory and disks; None: plain files
    cold_base: str | None = None  # the snapshot whose disks it serves to a guest that was booted
    captures: int = 0  # completed captures of the running process
    overlays: list[list[str]] = []  # per disk, file names since the last capture, oldest first
    frozen: bool = False  # its vCPUs stand because somebody asked for it, whatever else goes on
    tracker: bool = False
    agent: bool = True
    net: str = "none"
    ports: list[PortForward] = []
    cold: bool = False  # it was booted on its disk: its memory is not its snapshot's
    root_disk: str | None = None  # the digest of the image's root disk, which disk0 stands on
    error: dict[str, Any] | None = None
    reason: str | None = None


class DeviceRecord(msgspec.Struct, kw_only=True):
    """One device of a snapshot; digests are hex BLAKE3-256."""

    name: str
    size_bytes: int
    header_digest: str
    header_bytes: int
    captured_pages: int
    changed_pages: int | None = None  # neither the parent's nor zero twice; known once packed
    stored_bytes: int = 0
    builds: list[str] = []


class SnapshotRecord(msgspec.Struct, kw_only=True):
    """A snapshot, whole; the same structure is its manifest on disk."""

    version: int = 1
    id: str
    name: str | None
    sandbox: str
    parent: str | None
    state: str
    durability: str
    created_at: str
    boot_id: str
    image: str
    identity: Identity
    layout: int
    command_line: list[str]  # of the VMM, as far as the guest can see it
    memory_bytes: int
    cpus: int
    disks_bytes: list[int]
    hostname: str
    machine_id: str
    agent: bool
    dirty_source: str
    dirty_pages: int
    frozen_ms: float
    state_bytes: int
    state_digest: str
    devices: list[DeviceRecord]
    error: dict[str, Any] | None = None
    net: str = "none"
    root_disk: str | None = None
    # When somebody removed it: nobody sees it any more, and gc takes it when nothing stands on it.
    removed_at: str | msgspec.UnsetType = msgspec.UNSET
    cold: bool = False  # its memory is over zero: the guest was booted since the parent


# Made once: two threads that first decode one type at the same time have crashed msgspec.
_ENCODER = msgspec.json.Encoder()
_SANDBOX = msgspec.json.Decoder(SandboxRecord)
_SNAPSHOT = msgspec.json.Decoder(SnapshotRecord)


class Catalog:
    """The database of one home."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        migrate(self.database)
        self.journal = Journal(self.database)

    def close(self) -> None:
        """Close every connection."""
        self.database.close()

    def worked(self) -> None:
        """The home has been opened with this version: what it was before is not kept further."""
        forget_copies(self.database)

    # -- sandboxes -------------------------------------------------------------------------------

    def put_sandbox(self, record: SandboxRecord, *, durable: bool = False) -> None:
        """Insert or replace a sandbox; raises NameInUse where another one has its name."""
        with _names(record.name), self.database.transaction(durable=durable) as db:
            _put_sandbox(db, record)

    def sandbox(self, sandbox_id: str) -> SandboxRecord | None:
        """The sandbox with exactly this id."""
        rows = self.database.connection().execute(_SANDBOXES + "id = ?", (sandbox_id,))
        row = rows.fetchone()
        return None if row is None else _sandbox(*row)

    def sandboxes(self) -> list[SandboxRecord]:
        """Every sandbox that was not removed, oldest first."""
        rows = self.database.connection().execute(
            _SANDBOXES + "state != 'removed' ORDER BY created_at, id"
        )
        return [_sandbox(*row) for row in rows]

    # -- snapshots -------------------------------------------------------------------------------

    def put_snapshot(
        self,
        record: SnapshotRecord,
        *,
        durable: bool,
        sandbox: SandboxRecord | None = None,
    ) -> None:
        """Insert or replace a snapshot, and with it, in one transaction, its sandbox.

        Raises NameInUse where another snapshot has its name.
        """
        with _names(record.name), self.database.transaction(durable=durable) as db:
            _put_snapshot(db, record, paused=sandbox is not None and sandbox.state == "pausing")
            if sandbox is not None:
                _put_sandbox(db, sandbox)

    def snapshot(self, snapshot_id: str) -> SnapshotRecord | None:
        """The snapshot with exactly this id."""
        return self._snapshot(_SNAPSHOTS + "WHERE id = ?", snapshot_id)

    def snapshot_named(self, name: str) -> SnapshotRecord | None:
        """The snapshot with exactly this name."""
        return self._snapshot(_SNAPSHOTS + "WHERE name = ?", name)

    def snapshots(self, *, removed: bool = False) -> list[SnapshotRecord]:
        """Every snapshot, oldest first; with `removed` also those that wait for gc."""
        rows = self.database.connection().execute(_SNAPSHOTS + "ORDER BY created_at, id")
        found = (_snapshot(*row) for row in rows)
        return [record for record in found if removed or record.removed_at is msgspec.UNSET]

    def everything(self) -> tuple[list[SandboxRecord], list[SnapshotRecord]]:
        """All sandboxes, and all snapshots with removed ones, as they were at one instant."""
        db = self.database.connection()
        db.execute("BEGIN")
        try:
            return self.sandboxes(), self.snapshots(removed=True)
        finally:
            db.execute("COMMIT")

    def change_snapshot(
        self, snapshot: str, change: Callable[[SnapshotRecord], SnapshotRecord], *, durable: bool
    ) -> None:
        """Replace a snapshot by what `change` makes of it as it is now; none where it is gone."""
        with self.database.transaction(durable=durable) as db:
            if (found := self.snapshot(snapshot)) is None:
                return
            changed = change(found)
            _put_snapshot(db, changed)
            if found.removed_at is msgspec.UNSET and changed.removed_at is not msgspec.UNSET:
                told = {"name": found.name}
                note_event(db, "snapshot_removed", found.sandbox, found.id, None, told)

    def integrity(self) -> list[str]:
        """What SQLite finds wrong with the file; nothing where it is whole."""
        rows = self.database.connection().execute("PRAGMA integrity_check")
        return [str(line) for (line,) in rows if line != "ok"]

    def forget_snapshots(self, snapshots: list[str]) -> None:
        """Delete rows of removed snapshots, durably: before their files go."""
        with self.database.transaction(durable=True) as db:
            db.executemany("DELETE FROM snapshots WHERE id = ?", [(one,) for one in snapshots])

    def snapshot_state(self, snapshot_id: str) -> str | None:
        """Its state as it stands beside its record, which may be unreadable."""
        return _state(self.database.connection(), "snapshots", snapshot_id)

    def _snapshot(self, query: str, *arguments: str) -> SnapshotRecord | None:
        row = self.database.connection().execute(query, arguments).fetchone()
        return None if row is None else _snapshot(*row)

    # -- facts -----------------------------------------------------------------------------------

    def fact(self, name: str) -> str | None:
        """A remembered fact about this host, or None."""
        row = (
            self.database.connection()
            .execute("SELECT value FROM facts WHERE name = ?", (name,))
            .fetchone()
        )
        return None if row is None else str(row[0])

    def facts(self) -> dict[str, str]:
        """Every remembered fact."""
        rows = self.database.connection().execute("SELECT name, value FROM facts")
        return {str(name): str(value) for name, value in rows}

    def remember(self, name: str, value: str) -> None:
        """Remember a fact about this host."""
        with self.database.transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


@contextmanager
def _names(name: str | None) -> Iterator[None]:
    """A name is given once, however many ask for it at once."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        if name is None or "UNIQUE" not in str(error):
            raise
        raise NameInUse(name=name, owner="another") from error


def _state(db: sqlite3.Connection, table: str, row_id: str) -> str | None:
    row = db.execute(f"SELECT state FROM {table} WHERE id = ?", (row_id,)).fetchone()
    return None if row is None else str(row[0])


_SANDBOXES = "SELECT id, name, state, created_at, record FROM sandboxes WHERE "


def _sandbox(
    sandbox: str, name: str | None, state: str, created_at: str, record: bytes
) -> SandboxRecord:
    """A row as its record; a failed one in place of what can't be read, so that the rest works."""
    try:
        return _SANDBOX.decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        damaged = BlobDamaged(blob=f"catalog.sqlite3/sandboxes/{sandbox}", cause=str(error))
        return SandboxRecord(
            id=sandbox, name=name, state="removed" if state == "removed" else "failed",
            created_at=created_at, image="unknown", memory_bytes=0, cpus=0, disks_bytes=[],
            hostname="", machine_id="", error=damaged.to_dict(),
        )  # fmt: skip


_SNAPSHOTS = "SELECT id, name, sandbox, parent, created_at, record FROM snapshots "
_UNKNOWN = "unknown"


def _snapshot(
    snapshot: str,
    name: str | None,
    sandbox: str,
    parent: str | None,
    created_at: str,
    record: bytes,
) -> SnapshotRecord:
    """The same for a snapshot: what it was made of is not known, and its files stay."""
    try:
        return _SNAPSHOT.decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        damaged = BlobDamaged(blob=f"catalog.sqlite3/snapshots/{snapshot}", cause=str(error))
        return SnapshotRecord(
            id=snapshot, name=name, sandbox=sandbox, parent=parent, state="failed",
            durability="disk", created_at=created_at, boot_id="", image=_UNKNOWN,
            identity=Identity(_UNKNOWN, "", "", "", ""), layout=0, command_line=[], memory_bytes=0,
            cpus=0, disks_bytes=[], hostname="", machine_id="", agent=False,
            dirty_source=_UNKNOWN, dirty_pages=0, frozen_ms=0.0, state_bytes=0, state_digest="",
            devices=[], error=damaged.to_dict(),
        )  # fmt: skip


def is_unreadable(record: SnapshotRecord) -> bool:
    """Whether it stands in place of a row that can't be read."""
    return record.identity.kind == _UNKNOWN


def _put_sandbox(db: sqlite3.Connection, record: SandboxRecord) -> None:
    before = _state(db, "sandboxes", record.id)
    db.execute(
        "INSERT INTO sandboxes VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
        "name = excluded.name, state = excluded.state, record = excluded.record",
        (record.id, record.name, record.state, record.created_at, _ENCODER.encode(record)),
    )
    if told := events.of_sandbox(before, record):
        note_event(db, told[0], record.id, record.snapshot, None, told[1])


def _put_snapshot(db: sqlite3.Connection, record: SnapshotRecord, *, paused: bool = False) -> None:
    before = _state(db, "snapshots", record.id)
    db.execute(
        "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
        "name = excluded.name, state = excluded.state, record = excluded.record",
        (
            record.id, record.name, record.sandbox, record.parent, record.state,
            record.created_at, _ENCODER.encode(record),
        ),
    )  # fmt: skip
    if told := events.of_snapshot(before, record, paused=paused):
        note_event(db, told[0], record.sandbox, record.id, None, told[1])
