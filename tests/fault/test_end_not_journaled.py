"""A verb whose end can't be journaled: what it did stands and is answered, and the journal's last
word follows when it can be written. No guest is needed: the catalog is what fails."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator

import pytest

from diapause import database
from diapause.errors import StorageFailed
from diapause.model import GcRequest
from diapause.sandbox import recovery, rescue
from diapause.sandbox.engine import Engine
from diapause.sandbox.host import Host
from diapause.sandbox.upkeep.collect import Gc
from diapause.sandbox.upkeep.forget import RemoveSnapshot
from diapause.sandbox.verb import Verb
from diapause.store.home import Home
from tests.framework import captured_home as made
from tests.framework.catalog_tap import Tap, at_end
from tests.framework.fake_home import eventually

WAIT_S = 120.0


@pytest.fixture
def host(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """One that does not wait long for a catalog that others hold."""
    monkeypatch.setattr(database, "BUSY_MS", 100)
    with made.host_of(home) as host:
        yield host


@pytest.fixture
def other(host: Host) -> Iterator[sqlite3.Connection]:
    """Somebody else's connection to the catalog."""
    path = host.home.catalog
    made = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
    with contextlib.closing(made) as connection:
        yield connection
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def held_after(
    other: sqlite3.Connection, verb: type[Verb], step: str, patch: pytest.MonkeyPatch
) -> None:
    """The other holds the catalog from where a step has been taken."""
    method = f"do_{step}"
    take = getattr(verb, method)

    def held(it: Verb) -> None:
        take(it)
        other.execute("BEGIN IMMEDIATE")

    patch.setattr(verb, method, held)


def outcomes(host: Host, verb: str) -> list[str | None]:
    """How the journal says that each run of a verb ended; None where it says nothing."""
    with contextlib.closing(sqlite3.connect(host.home.catalog, timeout=WAIT_S)) as db:
        rows = db.execute("SELECT outcome FROM operations WHERE verb = ? ORDER BY rowid", (verb,))
        return [outcome for (outcome,) in rows]


def tried_again(caplog: pytest.LogCaptureFixture) -> Callable[[], bool]:
    """Whether somebody tried again, in vain."""
    return lambda: any(
        record.name == "diapause.rescue" and "is not journaled yet" in record.message
        for record in caplog.records
    )


@pytest.mark.parametrize("verb", [RemoveSnapshot, Gc])
def test_what_was_done_stands_and_its_end_is_written_later(
    host: Host, other: sqlite3.Connection, verb: type[Verb], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A removal of a snapshot, or the collection of its files: answered, and there."""
    engine, gone = Engine(host), made.packed(host).id
    held_after(other, verb, verb.steps[-1], monkeypatch)
    assert engine.remove_snapshot(gone).removed == [gone]
    if verb is Gc:
        assert engine.gc(GcRequest()).snapshots == [gone]
        assert not host.home.snapshot(gone).exists()
    assert host.catalog.snapshots() == []
    assert outcomes(host, verb.name) == [None]
    eventually("another attempt", tried_again(caplog), WAIT_S)
    other.execute("ROLLBACK")
    eventually("its end", lambda: outcomes(host, verb.name) == ["done"], WAIT_S)
    assert host.catalog.journal.open_operations() == []


def test_a_failure_keeps_its_own_error(
    host: Host, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the journal has its step and its code later."""

    def fails(_: Gc) -> None:
        other.execute("BEGIN IMMEDIATE")
        raise StorageFailed(what="the garbage", cause="a test")

    with monkeypatch.context() as patch:
        patch.setattr(Gc, "do_move", fails)
        with pytest.raises(StorageFailed, match="a test"):
            Engine(host).gc(GcRequest())
    assert outcomes(host, "gc") == [None]
    other.execute("ROLLBACK")
    Engine(host).gc(GcRequest())  # nothing is held by the one that failed
    wanted = [f"move: {StorageFailed.code}", "done"]
    eventually("its end", lambda: outcomes(host, "gc") == wanted, WAIT_S)


@pytest.mark.parametrize("why", ["the bound", "the daemon's end"])
def test_whoever_gives_up_leaves_it_to_the_next_daemon(
    host: Host, other: sqlite3.Connection, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not try for ever; recovery closes what is open."""
    gone = made.packed(host).id
    with monkeypatch.context() as patch:
        held_after(other, RemoveSnapshot, RemoveSnapshot.steps[-1], patch)
        Engine(host).remove_snapshot(gone)
    [operation] = host.catalog.journal.open_operations()
    if why == "the bound":
        monkeypatch.setattr(rescue, "RESCUE_S", 0.3)
    else:
        host.closing = True
    host.watch(lambda: rescue.close_later(host, operation.id, "done")).result(WAIT_S)
    assert outcomes(host, "snapshot-rm") == [None]
    host.closing = True  # the attempt of the verb itself ends as well
    other.execute("ROLLBACK")
    with made.host_of(host.home) as after:
        recovery.recover(after)
        assert outcomes(after, "snapshot-rm")[0] in ("recovered", "done")
        assert after.catalog.journal.open_operations() == []


def test_an_error_of_the_catalog_that_nobody_expects_fails_no_verb_that_is_done(host: Host) -> None:
    """One that has no type of ours."""
    tap, gone = Tap(host.home), made.packed(host).id
    tap.fail(at_end("snapshot-rm"))
    assert Engine(host).remove_snapshot(gone).removed == [gone]
    assert outcomes(host, "snapshot-rm") == [None]
    tap.clear()
    eventually("its end", lambda: outcomes(host, "snapshot-rm") == ["done"], WAIT_S)
