"""The SQLite file of a home: connections, transactions, and how far a commit reaches.

Invariants:
- Two ways to commit, one file. `durable=True` syncs (what must survive the host: a snapshot that
  was promised to be on disk). The rest is written through to the kernel and survives any death
  but the host's: after one, rows of running machines mean nothing anyway, and the boot id tells.
- A commit that failed stays failed. SQLite writes a transaction to its log before it syncs it, and
  what it wrote there is whole: where only the sync failed, the next process to open the database
  would find it and take it for committed. So something else is committed over it at once.
- A connection can write. SQLite opens a file for reading where opening it for writing failed, if
  only once and for want of a descriptor, and stays with that: such a connection is let go.
- When a database was closed, no connection is open and none is being closed: SQLite removes its log
  as the last one goes, and whoever removes or copies the home next must not meet it doing so.

Used from many threads: each has connections of its own, which go with it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import sqlite3
import threading
import weakref
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from diapause.errors import NotEnoughSpace, StorageFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger("diapause.database")

BUSY_MS = 20_000
# The name of the fact that is written over a commit that failed.
_OVERWRITTEN = "overwritten"
# The low byte of an extended error code is the kind of error.
_KIND = 0xFF


def now() -> str:
    """The present as RFC 3339, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Held:
    """A thread's connection, closed when the thread has ended: a daemon sees many come and go."""

    def __init__(self, db: sqlite3.Connection, closing: threading.RLock) -> None:
        self.db, self._closing = db, closing

    def __del__(self) -> None:
        with self._closing:
            self.db.close()


class Database:
    """The database of one home."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._all: weakref.WeakSet[_Held] = weakref.WeakSet()
        self._write = threading.Lock()
        self._closing = threading.RLock()  # a thread's end may come in the middle of the own close

    def connection(self, *, durable: bool = False) -> sqlite3.Connection:
        """This thread's connection, for reading; what it does is not in a transaction.

        Raises StorageFailed where the file can't be opened.
        """
        name = _name(durable)
        held: _Held | None = getattr(self._local, name, None)
        if held is None:
            held = self._opened(durable)
            setattr(self._local, name, held)
            self._all.add(held)
        return held.db

    def _opened(self, durable: bool) -> _Held:
        try:
            held = _Held(
                sqlite3.connect(
                    self.path, timeout=BUSY_MS / 1000, isolation_level=None,
                    check_same_thread=False,
                ),
                self._closing,
            )  # fmt: skip
            held.db.execute("PRAGMA journal_mode = WAL")
            held.db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        except sqlite3.Error as error:
            if (typed := storage_error(self.path, error)) is not None:
                raise typed from error
            raise
        return held

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All of the block or none of it; NotEnoughSpace and StorageFailed where it can't be kept.

        A failure inside the block or of the commit leaves nothing, now or after a restart.
        """
        db = self.connection(durable=durable)
        with self._write:  # within this process; SQLite's own lock is for other processes
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction:  # a full disk may have ended it
                    db.execute("ROLLBACK")
                kind = getattr(error, "sqlite_errorcode", 0) & _KIND
                if kind in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                    self._write_over()
                self._let_go_if_read_only(error, durable)
                if (typed := storage_error(self.path, error)) is not None:
                    raise typed from error
                raise

    def _write_over(self) -> None:
        """Commit something else where a commit that failed may lie whole in the log."""
        for durable in (True, False):
            db = self.connection(durable=durable)
            try:
                db.execute("BEGIN IMMEDIATE")
                db.execute(
                    "INSERT OR REPLACE INTO facts VALUES (?, ?)",
                    (_OVERWRITTEN, secrets.token_hex(8)),
                )
                db.execute("COMMIT")
            except sqlite3.Error as error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                self._let_go_if_read_only(error, durable)
                log.warning("writing over a failed commit: %s", error)
            else:
                return

    def _let_go_if_read_only(self, error: BaseException, durable: bool) -> None:
        """This thread's next transaction opens the file again."""
        if getattr(error, "sqlite_errorcode", 0) & _KIND == sqlite3.SQLITE_READONLY:
            with contextlib.suppress(AttributeError):
                delattr(self._local, _name(durable))

    @contextmanager
    def unlocked(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own that syncs, for what is no transaction: a copy, a migration."""
        db = sqlite3.connect(self.path, timeout=BUSY_MS / 1000, isolation_level=None)
        with contextlib.closing(db):
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            yield db

    def close(self) -> None:
        """Close every connection, when nobody is in a transaction: SQLite would not survive it."""
        with self._write, self._closing:
            for held in list(self._all):
                held.db.close()


def _name(durable: bool) -> str:
    return "durable" if durable else "quick"


def storage_error(path: Path, error: BaseException) -> NotEnoughSpace | StorageFailed | None:
    """What an error of SQLite says of the file system or of other processes, typed."""
    kind = getattr(error, "sqlite_errorcode", 0) & _KIND
    if kind == sqlite3.SQLITE_FULL:
        return NotEnoughSpace(
            what="The catalog", needed_bytes="more", directory=str(path.parent),
            available_bytes=shutil.disk_usage(path.parent).free,
        )  # fmt: skip
    if kind == sqlite3.SQLITE_BUSY:
        cause = f"another process has held it for {BUSY_MS // 1000} s"
        return StorageFailed(what="the catalog", cause=cause)
    if kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return StorageFailed(what="the catalog", cause=str(error))
    return None
