"""The catalog's versions: forwards, one step each, and a copy until the new one has worked.

docs/formats/catalog.md describes the tables. A step is one transaction that also counts the version
up, so a migration that dies anywhere goes on where it was at the next open. Before the first step
the database is copied to `catalog.vN.sqlite3` beside it, N its version, and the copy is synced; it
stays until `forget_copies`, which is called when the home has been opened with the new version.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from typing import TYPE_CHECKING

from diapause.database import storage_error
from diapause.errors import HomeNewer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diapause.database import Database

_COPY = re.compile(r"catalog\.v\d+\.sqlite3")

# STEPS[n] makes version n + 1 out of version n. The first Diapause made its tables and counted the
# version up afterwards, so the first step has to bear with tables that are there.
STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE IF NOT EXISTS sandboxes (
            id TEXT PRIMARY KEY, name TEXT, state TEXT NOT NULL, created_at TEXT NOT NULL,
            record BLOB NOT NULL) STRICT""",
        """CREATE UNIQUE INDEX IF NOT EXISTS sandbox_names ON sandboxes (name)
            WHERE name IS NOT NULL AND state NOT IN ('removing', 'removed')""",
        """CREATE TABLE IF NOT EXISTS snapshots (
            id TEXT PRIMARY KEY, name TEXT UNIQUE, sandbox TEXT NOT NULL, parent TEXT,
            state TEXT NOT NULL, created_at TEXT NOT NULL, record BLOB NOT NULL) STRICT""",
        "CREATE INDEX IF NOT EXISTS snapshot_sandboxes ON snapshots (sandbox)",
        """CREATE TABLE IF NOT EXISTS operations (
            id TEXT PRIMARY KEY, verb TEXT NOT NULL, sandbox TEXT NOT NULL, snapshot TEXT,
            boot_id TEXT NOT NULL, began_at TEXT NOT NULL, ended_at TEXT, outcome TEXT) STRICT""",
        "CREATE INDEX IF NOT EXISTS open_operations ON operations (sandbox) WHERE ended_at IS NULL",
        """CREATE TABLE IF NOT EXISTS steps (
            operation TEXT NOT NULL, number INTEGER NOT NULL, step TEXT NOT NULL, at TEXT NOT NULL,
            PRIMARY KEY (operation, number)) STRICT, WITHOUT ROWID""",
        "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    ),
    (
        "ALTER TABLE operations ADD COLUMN request TEXT",
        "CREATE INDEX operation_requests ON operations (request) WHERE request IS NOT NULL",
        """CREATE TABLE events (
            sequence INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL,
            sandbox TEXT, snapshot TEXT, operation TEXT, detail BLOB NOT NULL) STRICT""",
        """CREATE TABLE requests (
            key TEXT PRIMARY KEY, digest TEXT NOT NULL, operation TEXT NOT NULL,
            boot_id TEXT NOT NULL, began_at TEXT NOT NULL, ended_at TEXT, answer BLOB) STRICT""",
        "CREATE INDEX request_ages ON requests (began_at)",
    ),
)
VERSION = len(STEPS)


def migrate(database: Database) -> None:
    """Bring a database to VERSION; a new one too. Raises HomeNewer for one of a later version.

    Only the home's daemon may call it for an older one: it is the only writer.
    """
    with _typed(database), database.unlocked() as db:
        found = _version(db)
        if found > VERSION:
            raise HomeNewer(home=str(database.path.parent), found=found, known=VERSION)
        if 0 < found < VERSION:
            _copy(database, db, found)
        for version in range(found, VERSION):
            _step(db, version)
    database.path.chmod(0o600)


@contextlib.contextmanager
def _typed(database: Database) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if (typed := storage_error(database.path, error)) is not None:
            raise typed from error
        raise


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _step(db: sqlite3.Connection, version: int) -> None:
    """From `version` to the next, unless somebody was quicker."""
    db.execute("BEGIN IMMEDIATE")
    try:
        if _version(db) == version:
            for statement in STEPS[version]:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version + 1}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _copy(database: Database, db: sqlite3.Connection, version: int) -> None:
    """A copy that is whole or not there; one of an attempt that died is made again."""
    place = database.path.with_name(f"catalog.v{version}.sqlite3")
    fresh = place.with_name(f"{place.name}.new")
    fresh.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as copy:
        db.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
    fresh.chmod(0o600)
    _sync(fresh)
    fresh.rename(place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copies(database: Database) -> list[Path]:
    """The copies of earlier versions that are still kept."""
    return sorted(
        path for path in database.path.parent.iterdir() if _COPY.match(path.name) is not None
    )


def forget_copies(database: Database) -> None:
    """The migrated catalog has opened and worked: what it was before is of no use any more."""
    for path in copies(database):
        path.unlink()
