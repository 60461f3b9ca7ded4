"""The power goes at any call of a verb: what was promised is there, and nothing else is wrong.

`make test` opens a sample of the states, `make soak` every one.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from functools import partial

import pytest

from diapause.errors import DiapauseError
from diapause.guest.images import Image
from diapause.model import CaptureAnswer
from tests.framework.cuts import check_cuts, lost_but_named, overlays_are_there, sample
from tests.framework.power import Opened, Recording, recording
from tests.framework.sandbox import Daemon, Sandbox, real_home

_LAST = 3


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


def _capture_holds(made: Recording, found: Opened, promised: int) -> None:
    """What was promised is there; what was not is there whole, or gone with a cause."""
    answer: CaptureAnswer = made.answer
    sandbox, snapshot = found.sandboxes[answer.sandbox], found.snapshots.get(answer.snapshot)
    if promised and answer.durability == "disk":
        assert snapshot is not None
        assert snapshot.state == "packed"
        if "release" in answer.phases_ms:  # a pause
            assert (sandbox.state, sandbox.snapshot) == ("paused", snapshot.id)
    if sandbox.state == "failed":
        assert found.snapshots[made.begun_from].state == "packed"
        lost_but_named(found, sandbox)
        if promised and answer.durability == "disk":
            overlays_are_there(found, sandbox)
    else:
        assert sandbox.state == "paused"
        assert sandbox.snapshot is not None
        assert found.snapshots[sandbox.snapshot].state == "packed"


@pytest.mark.parametrize(
    ("verb", "durability"), [("pause", "disk"), ("save", "disk"), ("pause", "process")]
)
def test_a_capture(daemon: Daemon, saved: Sandbox, verb: str, durability: str) -> None:
    """Its promise holds from its answer on; before, the last snapshot is what there is."""
    with saved.forked() as guest:
        guest.rewrite()
        with _recorded_capture(daemon, guest, verb, durability) as made:
            check_cuts(made, sample(made), _capture_holds)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("durability", ["disk", "process"])
@pytest.mark.parametrize("verb", ["pause", "save"])
def test_every_state_of_a_capture(
    daemon: Daemon, saved: Sandbox, verb: str, durability: str
) -> None:
    with saved.forked() as guest:
        guest.rewrite()
        with _recorded_capture(daemon, guest, verb, durability) as made:
            check_cuts(made, list(made.states()), _capture_holds)


def test_a_capture_that_syncs_nothing_is_found_out(daemon: Daemon, saved: Sandbox) -> None:
    """The same recording without its syncs breaks the promise: the check can fail."""
    with saved.forked() as guest:
        guest.rewrite()
        with _recorded_capture(daemon, guest, "pause", "disk") as made:
            unsynced = made.without("fsync", "fdatasync")
            with pytest.raises((AssertionError, DiapauseError, sqlite3.DatabaseError)):
                check_cuts(unsynced, list(unsynced.states())[-_LAST:], _capture_holds)


def test_a_removal(daemon: Daemon, saved: Sandbox) -> None:
    """A sandbox that was removed is gone or whole, and its snapshots are untouched."""
    [guest] = saved.fork()
    guest.rewrite()
    kept = guest.save("disk").snapshot
    daemon.packed(kept)

    def holds(made: Recording, found: Opened, promised: int) -> None:
        assert found.snapshots[kept].state == "packed"
        assert guest.id not in found.sandboxes or found.sandboxes[guest.id].state == "failed"

    act = partial(daemon.client.remove, guest.id, force=True)
    with recording(daemon, (act, lambda _: b'"removed":["' + guest.id.encode())) as made:
        check_cuts(made, sample(made), holds)


@contextlib.contextmanager
def _recorded_capture(
    daemon: Daemon, guest: Sandbox, verb: str, durability: str
) -> Iterator[Recording]:
    act = partial(getattr(guest, verb), durability)
    begun_from = daemon.record(guest.id).snapshot
    assert begun_from is not None
    with recording(daemon, (act, _of_capture), after=lambda: _packed(daemon)) as made:
        made.begun_from = begun_from
        yield made
