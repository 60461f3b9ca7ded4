"""Holds or fails a daemon at an exact place: where it is about to write a certain row.

Every step of a verb is journaled before it is taken and every outcome is a row, so a trigger in the
catalog is a tap at each of these places, in the real daemon, without a line of its code changed.
A trigger that never ends holds the daemon inside its transaction: it is killed there and SQLite
forgets the transaction. A trigger that raises makes the write fail.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.framework.fake_home import eventually

if TYPE_CHECKING:
    from diapause.store.home import Home

WAIT_S = 120.0
# A transaction of the daemon takes milliseconds: one that lasts so long is held.
_HELD_S = 0.7
_ENDLESS = "SELECT count(*) FROM " + ", ".join(f"tap_rows t{i}" for i in range(12))
# Some hundred million rows: seconds, and longer on a slower machine, where the test is slower too.
_LONG = "SELECT count(*) FROM tap_rows a, tap_rows b, tap_rows c, (SELECT n FROM tap_rows LIMIT 15)"
_FAIL = "SELECT RAISE(ABORT, 'the tap is closed')"


@dataclass(frozen=True)
class Place:
    """A write to the catalog: a table, and a condition on its row, `NEW`."""

    name: str
    table: str
    condition: str
    event: str = "INSERT"


def before_step(verb: str, step: str) -> Place:
    """Where a step of a verb is about to be journaled: the steps before it are done."""
    condition = (
        f"NEW.step = '{step}' AND (SELECT verb FROM operations WHERE id = NEW.operation) = '{verb}'"
    )
    return Place(f"{verb} before {step}", "steps", condition)


def at_snapshot() -> Place:
    """Inside the commit of a capture: where its row is about to be written."""
    return Place("the snapshot's row", "snapshots", "NEW.state = 'captured'")


def at_end(verb: str) -> Place:
    """Where a verb is done, and its operation is about to be closed."""
    condition = f"NEW.outcome = 'done' AND NEW.verb = '{verb}'"
    return Place(f"{verb} at its end", "operations", condition, "UPDATE")


class Tap:
    """Taps of one catalog."""

    def __init__(self, home: Home) -> None:
        self._path = home.catalog

    @contextlib.contextmanager
    def _open(self, timeout_s: float = 60.0) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=timeout_s, isolation_level=None)
        with contextlib.closing(connection):
            yield connection

    def hold(self, place: Place) -> None:
        """The daemon stays at this place until it is killed."""
        self._set(place, _ENDLESS)

    def slow(self, place: Place) -> None:
        """The daemon stays at this place for some seconds, inside its transaction, and goes on."""
        self._set(place, _LONG)

    def fail(self, place: Place) -> None:
        """The daemon's write at this place fails."""
        self._set(place, _FAIL)

    @contextlib.contextmanager
    def packing_fails(self) -> Iterator[None]:
        """Nothing is packed while the block runs."""
        was = "(SELECT state FROM snapshots WHERE id = NEW.id)"
        condition = f"NEW.state = 'packed' AND {was} = 'captured'"
        self.fail(Place("packing", "snapshots", condition))
        try:
            yield
        finally:
            self.clear()

    def write(self, statement: str) -> None:
        """Change rows behind the daemon's back."""
        with self._open() as db:
            db.execute(statement)

    def _set(self, place: Place, action: str) -> None:
        self.clear()
        with self._open() as db:
            db.execute("CREATE TABLE tap_rows (n)")
            db.executemany("INSERT INTO tap_rows VALUES (?)", [(n,) for n in range(200)])
            db.execute(
                f"CREATE TRIGGER tap BEFORE {place.event} ON {place.table} "
                f"WHEN {place.condition} BEGIN {action}; END"
            )

    def clear(self) -> None:
        """Open everything; needs a daemon that is not held."""
        with self._open() as db:
            db.execute("DROP TRIGGER IF EXISTS tap")
            db.execute("DROP TABLE IF EXISTS tap_rows")

    def wait_held(self) -> None:
        """Wait until the daemon has come to the place."""
        eventually("the daemon's coming to the tap", self._is_held, WAIT_S)

    def _is_held(self) -> bool:
        try:
            with self._open(_HELD_S) as db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return True
        return False
