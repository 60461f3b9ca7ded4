"""What happened and what is under way: operations and their steps, events, kept requests.

- An *operation* here is one run of a verb on one sandbox. It is append-only: a step is there before
  it is taken. What a client asked for may take several of them, which then name its `request`.
- An *event* is something that happened to a sandbox or a snapshot, for whoever watches. They are
  numbered without gaps going unnoticed: a number is never given twice.
- A *kept request* is what an idempotency key stands for: the digest of what was asked, the
  operation that does it, and its answer.

All three are bounded in number or age, oldest first; what is open is never dropped.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from diapause.database import now
from diapause.limits import (
    EVENT_DETAIL_BYTES_MAX,
    EVENTS_MAX,
    IDEMPOTENCY_KEYS_MAX,
    IDEMPOTENCY_S,
    OPERATIONS_KEPT_MAX,
)
from diapause.model import Event
from diapause.operation import current

if TYPE_CHECKING:
    import sqlite3

    from diapause.database import Database

# How often the oldest are dropped: every so many, for a few rows more do no harm.
_DROP_EVERY = 64


class OperationRecord(msgspec.Struct, kw_only=True):
    """A run of a verb, as the journal has it; while it is open it has no end and no outcome."""

    id: str
    verb: str
    sandbox: str
    snapshot: str | None
    boot_id: str
    steps: list[str]
    request: str | None = None
    began_at: str = ""
    ended_at: str | None = None
    outcome: str | None = None


class KeptRequest(msgspec.Struct, kw_only=True):
    """What an idempotency key stands for; `answer` is None until the operation has ended."""

    key: str
    digest: str
    operation: str
    boot_id: str
    began_at: str
    ended_at: str | None
    answer: bytes | None


# Made once: two threads that first decode one type at the same time have crashed msgspec.
_DETAIL = msgspec.json.Decoder(dict[str, Any])
_COLUMNS = "id, verb, sandbox, snapshot, boot_id, request, began_at, ended_at, outcome"


class Journal:
    """The journal of one home; its methods may be called from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # -- operations ------------------------------------------------------------------------------

    def begin(
        self,
        operation: str,
        verb: str,
        sandbox: str,
        snapshot: str | None,
        boot_id: str,
        request: str | None = None,
    ) -> None:
        """Open an operation; `request` is the id of what a client asked for, where one did."""
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, NULL, NULL, ?)",
                (operation, verb, sandbox, snapshot, boot_id, now(), request),
            )

    def step(self, operation: str, number: int, step: str) -> None:
        """Journal a step that is about to be taken."""
        with self._database.transaction() as db:
            db.execute("INSERT INTO steps VALUES (?, ?, ?, ?)", (operation, number, step, now()))

    def end(self, operation: str, outcome: str) -> None:
        """Close an operation with a word about how."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE operations SET ended_at = ?, outcome = ? WHERE id = ?",
                (now(), outcome, operation),
            )
            _drop_old_operations(db)

    def open_operations(self, sandbox: str | None = None) -> list[OperationRecord]:
        """Operations without an end, oldest first."""
        if sandbox:
            return self._operations("ended_at IS NULL AND sandbox = ?", sandbox)
        return self._operations("ended_at IS NULL")

    def operations_of(self, request: str) -> list[OperationRecord]:
        """The operations of what a client asked for, oldest first."""
        return self._operations("request = ?", request)

    def _operations(self, condition: str, *arguments: str) -> list[OperationRecord]:
        db = self._database.connection()
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM operations WHERE {condition} ORDER BY began_at, id",
            arguments,
        ).fetchall()
        return [
            OperationRecord(
                id=row[0], verb=row[1], sandbox=row[2], snapshot=row[3], boot_id=row[4],
                request=row[5], began_at=row[6], ended_at=row[7], outcome=row[8],
                steps=[
                    step
                    for (step,) in db.execute(
                        "SELECT step FROM steps WHERE operation = ? ORDER BY number", (row[0],)
                    )
                ],
            )
            for row in rows
        ]  # fmt: skip

    # -- events ----------------------------------------------------------------------------------

    def event(
        self,
        kind: str,
        *,
        sandbox: str | None = None,
        snapshot: str | None = None,
        operation: str | None = None,
        detail: dict[str, Any] | None = None,
    ) -> Event:
        """Note that something happened; a detail that is too large is left out, which it says."""
        with self._database.transaction() as db:
            return note_event(db, kind, sandbox, snapshot, operation, detail)

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """At most `limit` events with a higher number than `after`, oldest first."""
        rows = self._database.connection().execute(
            "SELECT sequence, at, kind, sandbox, snapshot, operation, detail FROM events "
            "WHERE sequence > ? ORDER BY sequence LIMIT ?",
            (after, limit),
        )
        return [
            Event(
                sequence=row[0], at=row[1], kind=row[2], sandbox=row[3], snapshot=row[4],
                operation=row[5], detail=_DETAIL.decode(row[6]),
            )
            for row in rows
        ]  # fmt: skip

    def last_event(self) -> int:
        """The number of the newest event; 0 where there is none."""
        found = self._database.connection().execute("SELECT max(sequence) FROM events").fetchone()
        return int(found[0] or 0)

    # -- kept requests ---------------------------------------------------------------------------

    def keep_request(
        self, key: str, digest: str, operation: str, boot_id: str
    ) -> KeptRequest | None:
        """Keep a new request under its key; what the key stands for already, if it does."""
        with self._database.transaction() as db:
            _drop_old_requests(db)
            found = _kept(db, key)
            if found is None:
                db.execute(
                    "INSERT INTO requests VALUES (?, ?, ?, ?, ?, NULL, NULL)",
                    (key, digest, operation, boot_id, now()),
                )
            return found

    def answer_request(self, key: str, operation: str, answer: bytes) -> None:
        """Keep the answer that whoever asks again is given; only of the operation that has it."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE requests SET ended_at = ?, answer = ? WHERE key = ? AND operation = ?",
                (now(), answer, key, operation),
            )

    def forget_request(self, key: str, operation: str) -> None:
        """A request that came to nothing: asked again, it is begun anew."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM requests WHERE key = ? AND operation = ?", (key, operation))

    def kept_request(self, key: str) -> KeptRequest | None:
        """What a key stands for."""
        return _kept(self._database.connection(), key)

    def open_requests(self) -> list[KeptRequest]:
        """Kept requests without an answer, oldest first."""
        rows = self._database.connection().execute(
            "SELECT key FROM requests WHERE ended_at IS NULL ORDER BY began_at, key"
        )
        found = (self.kept_request(key) for (key,) in rows.fetchall())
        return [kept for kept in found if kept is not None]


def note_event(
    db: sqlite3.Connection,
    kind: str,
    sandbox: str | None = None,
    snapshot: str | None = None,
    operation: str | None = None,
    detail: dict[str, Any] | None = None,
) -> Event:
    """`Journal.event` within a transaction: noted with what is written there, or not at all.

    Without an operation it is that of this thread, where it works for one.
    """
    if operation is None and (asked := current()) is not None:
        operation = asked.id
    encoded = msgspec.json.encode(detail or {})
    if len(encoded) > EVENT_DETAIL_BYTES_MAX:
        encoded = msgspec.json.encode({"left_out_bytes": len(encoded)})
    at = now()
    sequence = db.execute(
        "INSERT INTO events VALUES (NULL, ?, ?, ?, ?, ?, ?)",
        (at, kind, sandbox, snapshot, operation, encoded),
    ).lastrowid
    assert sequence is not None
    if sequence % _DROP_EVERY == 0:
        db.execute("DELETE FROM events WHERE sequence <= ?", (sequence - EVENTS_MAX,))
    return Event(
        sequence=sequence, at=at, kind=kind, sandbox=sandbox, snapshot=snapshot,
        operation=operation, detail=_DETAIL.decode(encoded),
    )  # fmt: skip


def _kept(db: sqlite3.Connection, key: str) -> KeptRequest | None:
    row = db.execute(
        "SELECT key, digest, operation, boot_id, began_at, ended_at, answer FROM requests "
        "WHERE key = ?",
        (key,),
    ).fetchone()
    if row is None:
        return None
    return KeptRequest(**dict(zip(KeptRequest.__struct_fields__, row, strict=True)))


def _drop_old_operations(db: sqlite3.Connection) -> None:
    """Of those that have ended, only so many are kept."""
    newest = int(db.execute("SELECT max(rowid) FROM operations").fetchone()[0] or 0)
    if newest % _DROP_EVERY:
        return
    old = "SELECT id FROM operations WHERE rowid <= ? AND ended_at IS NOT NULL"
    upto = (newest - OPERATIONS_KEPT_MAX,)
    db.execute(f"DELETE FROM steps WHERE operation IN ({old})", upto)
    db.execute("DELETE FROM operations WHERE rowid <= ? AND ended_at IS NOT NULL", upto)


def _drop_old_requests(db: sqlite3.Connection) -> None:
    """Too old, or too many; one that has no answer yet stays, whatever its age."""
    oldest = datetime.now(UTC) - timedelta(seconds=IDEMPOTENCY_S)
    limit = oldest.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    db.execute("DELETE FROM requests WHERE began_at < ? AND ended_at IS NOT NULL", (limit,))
    count = int(db.execute("SELECT count(*) FROM requests").fetchone()[0])
    if count >= IDEMPOTENCY_KEYS_MAX:
        db.execute(
            "DELETE FROM requests WHERE key IN (SELECT key FROM requests "
            "WHERE ended_at IS NOT NULL ORDER BY began_at LIMIT ?)",
            (count - IDEMPOTENCY_KEYS_MAX + 1,),
        )
