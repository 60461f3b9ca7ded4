"""Many verbs at once: one order, no deadlock, and one home knows nothing of another."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from diapause.catalog import Catalog
from diapause.errors import NameInUse, WrongState
from diapause.guest.images import Image
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm

VERBS_AT_ONCE = 20


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def guest(daemon: Daemon) -> Sandbox:
    made = daemon.run(name="web")
    made.start_counter()
    return made


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call came to, all of them begun together."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (WrongState, NameInUse) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(outcome, call) for call in calls]
        return [future.result(2 * WAIT_S) for future in futures]


def test_twenty_verbs_at_once_on_one_sandbox(daemon: Daemon, guest: Sandbox) -> None:
    """They take their turns: the journal shows one after the other, and the guest is whole."""
    value = guest.counted()
    verbs: list[Callable[[], Any]] = [guest.pause, guest.resume, guest.save, guest.resume]
    outcomes = at_once([verbs[number % len(verbs)] for number in range(VERBS_AT_ONCE)])
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert all(isinstance(error, WrongState) for error in failed), failed
    if guest.state == "paused":
        guest.resume()
    guest.counts_beyond(value)
    check_one_order(daemon, guest.id)


def check_one_order(daemon: Daemon, sandbox: str) -> None:
    """Of one sandbox, no operation began before the one before it had ended."""
    with contextlib.closing(Catalog(daemon.home.catalog)) as catalog:
        rows = catalog.database.connection().execute(
            "SELECT verb, began_at, ended_at FROM operations WHERE sandbox = ? ORDER BY rowid",
            (sandbox,),
        )
        operations = rows.fetchall()
    assert len(operations) > 1
    for (verb, _, ended), (following, began, _) in itertools.pairwise(operations):
        assert ended is not None, verb
        assert ended <= began, (verb, following)


def test_two_clients_and_one_name(daemon: Daemon, guest: Sandbox) -> None:
    """One of them has it; the other is refused and leaves nothing."""
    outcomes = at_once([lambda: guest.save(name="release")] * 4)
    assert sum(isinstance(outcome, NameInUse) for outcome in outcomes) == 3
    named = [row for row in daemon.client.snapshots() if row.name == "release"]
    assert len(named) == 1
    guest.counted()


def test_two_daemons_with_two_homes(daemon: Daemon, guest: Sandbox, tiny_image: Image) -> None:
    """Each has its own; stopping or killing one does not touch the other's guests."""
    with real_home(tiny_image) as other:
        theirs = other.run(name="web")
        assert theirs.id != guest.id
        pid = guest.vmm_pid
        at_once([guest.save, theirs.save, guest.save, theirs.save])
        assert [row.sandbox for row in other.client.sandboxes()] == [theirs.id]
        assert guest.id in [row.sandbox for row in daemon.client.sandboxes()]
        other.kill()
        assert theirs.state == "running"
        theirs.remove()
        assert (guest.state, guest.vmm_pid) == ("running", pid)
        guest.counted()
