"""The power goes at any call of a verb: what was promised is there, and nothing else is wrong.

`make test` opens a sample of the states, `make soak` every one.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diapause.errors import DiapauseError
from diapause.guest.images import Image
from diapause.model import CaptureAnswer
from diapause.store.home import Home
from tests.framework.disk_model import State
from tests.framework.power import Opened, Recording, built, opened, recording
from tests.framework.sandbox import Daemon, Sandbox, real_home

Holds = Callable[[Recording, Opened, bool], None]
# Of each recording: so many states over all of it, and the last ones, after the promise.
_SPREAD, _LAST = 8, 3


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def saved(daemon: Daemon) -> Sandbox:
    """A guest with one packed snapshot."""
    guest = daemon.run()
    guest.rewrite()
    daemon.packed(guest.save("disk").snapshot)
    return guest


def _newest(daemon: Daemon) -> str:
    return max(daemon.client.snapshots(), key=lambda row: row.created_at).id


def _packed(daemon: Daemon) -> None:
    daemon.packed(_newest(daemon))


def _of_capture(answer: CaptureAnswer) -> bytes:
    return f'"snapshot":"{answer.snapshot}","durability"'.encode()


def _sample(made: Recording) -> list[tuple[int, str, State]]:
    states = list(made.states())
    assert len(states) > 20, "too few for a verb that writes"
    return [*states[: -_LAST : len(states) // _SPREAD], *states[-_LAST:]]


def _check(made: Recording, states: list[tuple[int, str, State]], holds: Holds) -> None:
    for number, kept, state in states:
        place = f"after call {number} of {len(made.calls)} ({made.calls[number].name}), {kept}"
        with built(state, made.begin.parent) as home:
            rows = [_open(made, home, number, holds, place) for _ in range(2)]
        assert rows[0] == rows[1], place


def _open(made: Recording, home: Home, number: int, holds: Holds, place: str) -> object:
    with opened(home) as found:
        found.settle()
        holds(made, found, made.promised(number))
        for snapshot, row in found.snapshots.items():
            if row.state != "failed":
                assert found.device_digests(snapshot) == made.digests[snapshot], place
        assert list(home.tmp.iterdir()) == [], place
        return [(row.id, row.state, row.error) for row in found.sandboxes.values()] + [
            (row.id, row.state, row.error) for row in found.snapshots.values()
        ]


def _capture_holds(made: Recording, found: Opened, promised: bool) -> None:
    """What was promised is there; what was not is there whole, or gone with a cause."""
    answer: CaptureAnswer = made.answer
    sandbox, snapshot = found.sandboxes[answer.sandbox], found.snapshots.get(answer.snapshot)
    if promised and answer.durability == "disk":
        assert snapshot is not None
        assert snapshot.state == "packed"
        if "release" in answer.phases_ms:  # a pause
            assert (sandbox.state, sandbox.snapshot) == ("paused", snapshot.id)
    if sandbox.state == "failed":
        assert sandbox.error is not None
        assert found.snapshots[made.begun_from].state == "packed"
        whole = sandbox.error["fields"]["snapshot"]
        assert (sandbox.error["code"], found.snapshots[whole].state) == ("guest_lost", "packed")
        assert whole in sandbox.error["message"]
    else:
        assert sandbox.state == "paused"
        assert sandbox.snapshot is not None
        assert found.snapshots[sandbox.snapshot].state == "packed"


@pytest.mark.parametrize(
    ("verb", "durability"), [("pause", "disk"), ("save", "process"), ("pause", "process")]
)
def test_a_capture(daemon: Daemon, saved: Sandbox, verb: str, durability: str) -> None:
    """Its promise holds from its answer on; before, the last snapshot is what there is."""
    with saved.forked() as guest:
        guest.rewrite()
        with _recorded_capture(daemon, guest, verb, durability) as made:
            _check(made, _sample(made), _capture_holds)


@pytest.mark.soak
@pytest.mark.parametrize("durability", ["disk", "process"])
@pytest.mark.parametrize("verb", ["pause", "save"])
def test_every_state_of_a_capture(
    daemon: Daemon, saved: Sandbox, verb: str, durability: str
) -> None:
    with saved.forked() as guest:
        guest.rewrite()
        with _recorded_capture(daemon, guest, verb, durability) as made:
            _check(made, list(made.states()), _capture_holds)


def test_a_capture_that_syncs_nothing_is_found_out(daemon: Daemon, saved: Sandbox) -> None:
    """The same recording without its syncs breaks the promise: the check can fail."""
    with saved.forked() as guest:
        guest.rewrite()
        with _recorded_capture(daemon, guest, "pause", "disk") as made:
            unsynced = made.without("fsync", "fdatasync")
            with pytest.raises((AssertionError, DiapauseError, sqlite3.DatabaseError)):
                _check(unsynced, list(unsynced.states())[-_LAST:], _capture_holds)


def test_a_removal(daemon: Daemon, saved: Sandbox) -> None:
    """A sandbox that was removed is gone or whole, and its snapshots are untouched."""
    [guest] = saved.fork()
    guest.rewrite()
    kept = guest.save("disk").snapshot
    daemon.packed(kept)

    def holds(made: Recording, found: Opened, promised: bool) -> None:
        assert found.snapshots[kept].state == "packed"
        assert guest.id not in found.sandboxes or found.sandboxes[guest.id].state == "failed"

    act = partial(daemon.client.remove, guest.id, force=True)
    with recording(daemon, act, lambda answer: b'"removed":["' + guest.id.encode()) as made:
        _check(made, _sample(made), holds)


@contextlib.contextmanager
def _recorded_capture(
    daemon: Daemon, guest: Sandbox, verb: str, durability: str
) -> Iterator[Recording]:
    act = partial(getattr(guest, verb), durability)
    begun_from = daemon.record(guest.id).snapshot
    assert begun_from is not None
    with recording(daemon, act, _of_capture, lambda: _packed(daemon)) as made:
        made.begun_from = begun_from
        yield made
