"""The catalog: one SQLite database of rows and the journal of every lifecycle step.

Invariants:
- A row never says more than the files hold: files first, then the row.
- Two ways to commit, one file. `durable=True` syncs (what must survive the host: a snapshot that
  was promised to be on disk). The rest is written through to the kernel and survives any death
  but the host's: after one, rows of running machines mean nothing anyway, and the boot id tells.
- The journal is append-only within an operation: a step is there before it is taken.

Used from many threads: each has connections of its own, which go with it.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import weakref
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from diapause.errors import HomeNewer, NameInUse, NotEnoughSpace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VERSION = 1
BUSY_MS = 20_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sandboxes (
    id TEXT PRIMARY KEY, name TEXT, state TEXT NOT NULL, created_at TEXT NOT NULL,
    record BLOB NOT NULL) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS sandbox_names ON sandboxes (name)
    WHERE name IS NOT NULL AND state NOT IN ('removing', 'removed');
CREATE TABLE IF NOT EXISTS snapshots (
    id TEXT PRIMARY KEY, name TEXT UNIQUE, sandbox TEXT NOT NULL, parent TEXT,
    state TEXT NOT NULL, created_at TEXT NOT NULL, record BLOB NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS snapshot_sandboxes ON snapshots (sandbox);
CREATE TABLE IF NOT EXISTS operations (
    id TEXT PRIMARY KEY, verb TEXT NOT NULL, sandbox TEXT NOT NULL, snapshot TEXT,
    boot_id TEXT NOT NULL, began_at TEXT NOT NULL, ended_at TEXT, outcome TEXT) STRICT;
CREATE INDEX IF NOT EXISTS open_operations ON operations (sandbox) WHERE ended_at IS NULL;
CREATE TABLE IF NOT EXISTS steps (
    operation TEXT NOT NULL, number INTEGER NOT NULL, step TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (operation, number)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


def now() -> str:
    """The present as RFC 3339, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
    captures: int = 0  # completed captures of the running process
    overlays: list[list[str]] = []  # per disk, file names since the last capture, oldest first
    tracker: bool = False
    agent: bool = True
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


class Operation(msgspec.Struct, kw_only=True):
    """A verb that began and did not end, as recovery finds it."""

    id: str
    verb: str
    sandbox: str
    snapshot: str | None
    boot_id: str
    steps: list[str]


class _Held:
    """A thread's connection, closed when the thread has ended: a daemon sees many come and go."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def __del__(self) -> None:
        self.db.close()


class Catalog:
    """The database of one home."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._all: weakref.WeakSet[_Held] = weakref.WeakSet()
        self._write = threading.Lock()
        self._migrate()

    def _migrate(self) -> None:
        db = self._connection(durable=True)
        found = int(db.execute("PRAGMA user_version").fetchone()[0])
        if found > VERSION:
            raise HomeNewer(home=str(self._path.parent), found=found, known=VERSION)
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {VERSION}")
        self._path.chmod(0o600)

    def _connection(self, *, durable: bool) -> sqlite3.Connection:
        name = "durable" if durable else "quick"
        held: _Held | None = getattr(self._local, name, None)
        if held is None:
            db = sqlite3.connect(
                self._path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
            )
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            held = _Held(db)
            setattr(self._local, name, held)
            self._all.add(held)
        return held.db

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        db = self._connection(durable=durable)
        with self._write:  # within this process; SQLite's own lock is for other processes
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction:  # a full disk may have ended it
                    db.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                    raise self._full() from error
                raise

    def _full(self) -> NotEnoughSpace:
        home = self._path.parent
        return NotEnoughSpace(
            what="The catalog", needed_bytes="more", directory=str(home),
            available_bytes=shutil.disk_usage(home).free,
        )  # fmt: skip

    def close(self) -> None:
        """Close every connection."""
        for held in list(self._all):
            held.db.close()

    # -- sandboxes -------------------------------------------------------------------------------

    def put_sandbox(self, record: SandboxRecord, *, durable: bool = False) -> None:
        """Insert or replace a sandbox; raises NameInUse where another one has its name."""
        with _names(record.name), self._transaction(durable=durable) as db:
            _put_sandbox(db, record)

    def sandbox(self, sandbox_id: str) -> SandboxRecord | None:
        """The sandbox with exactly this id."""
        found = self._one("SELECT record FROM sandboxes WHERE id = ?", sandbox_id)
        return None if found is None else msgspec.json.decode(found, type=SandboxRecord)

    def sandboxes(self) -> list[SandboxRecord]:
        """Every sandbox that was not removed, oldest first."""
        rows = self._connection(durable=False).execute(
            "SELECT record FROM sandboxes WHERE state != 'removed' ORDER BY created_at, id"
        )
        return [msgspec.json.decode(row[0], type=SandboxRecord) for row in rows]

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
        with _names(record.name), self._transaction(durable=durable) as db:
            db.execute(
                "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "name = excluded.name, state = excluded.state, record = excluded.record",
                (
                    record.id, record.name, record.sandbox, record.parent, record.state,
                    record.created_at, msgspec.json.encode(record),
                ),
            )  # fmt: skip
            if sandbox is not None:
                _put_sandbox(db, sandbox)

    def snapshot(self, snapshot_id: str) -> SnapshotRecord | None:
        """The snapshot with exactly this id."""
        found = self._one("SELECT record FROM snapshots WHERE id = ?", snapshot_id)
        return None if found is None else msgspec.json.decode(found, type=SnapshotRecord)

    def snapshots(self) -> list[SnapshotRecord]:
        """Every snapshot, oldest first."""
        rows = self._connection(durable=False).execute(
            "SELECT record FROM snapshots ORDER BY created_at, id"
        )
        return [msgspec.json.decode(row[0], type=SnapshotRecord) for row in rows]

    def _one(self, query: str, *arguments: str) -> bytes | None:
        row = self._connection(durable=False).execute(query, arguments).fetchone()
        return None if row is None else row[0]

    # -- the journal -----------------------------------------------------------------------------

    def begin(
        self, operation: str, verb: str, sandbox: str, snapshot: str | None, boot_id: str
    ) -> None:
        """Open an operation."""
        with self._transaction(durable=False) as db:
            db.execute(
                "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, NULL, NULL)",
                (operation, verb, sandbox, snapshot, boot_id, now()),
            )

    def step(self, operation: str, number: int, step: str) -> None:
        """Journal a step that is about to be taken."""
        with self._transaction(durable=False) as db:
            db.execute("INSERT INTO steps VALUES (?, ?, ?, ?)", (operation, number, step, now()))

    def end(self, operation: str, outcome: str) -> None:
        """Close an operation with a word about how."""
        with self._transaction(durable=False) as db:
            db.execute(
                "UPDATE operations SET ended_at = ?, outcome = ? WHERE id = ?",
                (now(), outcome, operation),
            )

    def open_operations(self, sandbox: str | None = None) -> list[Operation]:
        """Operations without an end, oldest first."""
        where, arguments = ("AND sandbox = ?", (sandbox,)) if sandbox else ("", ())
        db = self._connection(durable=False)
        rows = db.execute(
            "SELECT id, verb, sandbox, snapshot, boot_id FROM operations "
            f"WHERE ended_at IS NULL {where} ORDER BY began_at, id",
            arguments,
        ).fetchall()
        return [
            Operation(
                id=row[0], verb=row[1], sandbox=row[2], snapshot=row[3], boot_id=row[4],
                steps=[
                    step
                    for (step,) in db.execute(
                        "SELECT step FROM steps WHERE operation = ? ORDER BY number", (row[0],)
                    )
                ],
            )
            for row in rows
        ]  # fmt: skip

    # -- facts -----------------------------------------------------------------------------------

    def fact(self, name: str) -> str | None:
        """A remembered fact about this host, or None."""
        row = (
            self._connection(durable=False)
            .execute("SELECT value FROM facts WHERE name = ?", (name,))
            .fetchone()
        )
        return None if row is None else str(row[0])

    def facts(self) -> dict[str, str]:
        """Every remembered fact."""
        rows = self._connection(durable=False).execute("SELECT name, value FROM facts")
        return {str(name): str(value) for name, value in rows}

    def remember(self, name: str, value: str) -> None:
        """Remember a fact about this host."""
        with self._transaction(durable=False) as db:
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


def _put_sandbox(db: sqlite3.Connection, record: SandboxRecord) -> None:
    db.execute(
        "INSERT INTO sandboxes VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
        "name = excluded.name, state = excluded.state, record = excluded.record",
        (record.id, record.name, record.state, record.created_at, msgspec.json.encode(record)),
    )
