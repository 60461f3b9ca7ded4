"""Sandboxes put back to a snapshot, from every state, and what becomes of them when that fails."""

from __future__ import annotations

import os
import signal

import pytest

from diapause.errors import DiapauseError, RestoreFailed, SnapshotIncompatible, WrongState
from diapause.sandbox.restore import Restore
from diapause.units import MIB
from tests.framework.catalog_tap import Place, Tap, at_end, before_step
from tests.framework.fake_home import eventually
from tests.framework.kills import kill_at
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox

pytestmark = pytest.mark.vm

PLACES = [*(before_step("restore", step) for step in Restore.steps), at_end("restore")]


class Past:
    """A guest with a snapshot, and what it became since."""

    def __init__(self, guest: Sandbox) -> None:
        self.guest = guest
        guest.start_counter()
        self.then = guest.rewrite()
        self.snapshot = guest.save("disk").snapshot
        self.count = guest.counted()
        self.now = guest.rewrite()

    def is_then(self) -> bool:
        return self.guest.digests() == self.then


@pytest.fixture
def past(guest: Sandbox) -> Past:
    return Past(guest)


def test_there_and_back(past: Past) -> None:
    """It runs from the snapshot on; what it was before is the snapshot that the answer names."""
    guest = past.guest
    stream = guest.stream("sleep", "1000")
    restored = guest.restore(past.snapshot)
    assert (restored.state, restored.snapshot, restored.notes) == ("running", past.snapshot, [])
    assert restored.saved not in (None, past.snapshot)
    assert past.is_then()
    guest.counts_beyond(1)
    with pytest.raises(DiapauseError) as cut:
        stream.finish()
    assert cut.value.exit_code == 125
    assert restored.saved is not None
    back = guest.restore(restored.saved)
    assert back.saved not in (None, restored.saved, past.snapshot)
    assert guest.digests() == past.now
    guest.counts_beyond(past.count)


def test_what_is_discarded_is_not_saved(daemon: Daemon, past: Past) -> None:
    """No snapshot more than before, and the VMM of what it was is gone."""
    before, pid = len(daemon.client.snapshots()), past.guest.vmm_pid
    restored = past.guest.restore(past.snapshot, discard=True)
    assert (restored.saved, restored.state) == (None, "running")
    assert past.is_then()
    assert len(daemon.client.snapshots()) == before
    assert pid not in daemon.vmms()


def test_a_paused_or_frozen_one_is_paused_afterwards(past: Past) -> None:
    """What a paused one stood at is named as saved."""
    guest = past.guest
    stood = guest.pause().snapshot
    restored = guest.restore(past.snapshot)
    assert (restored.saved, restored.state, guest.state) == (stood, "paused", "paused")
    assert guest.restore(past.snapshot).already
    guest.resume()
    assert past.is_then()
    guest.freeze()
    frozen = guest.restore(stood)
    assert (frozen.state, guest.state) == ("paused", "paused")
    assert frozen.saved is not None
    guest.resume()
    assert guest.digests() == past.now


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_one_that_ended_needs_discard(past: Past, end: str) -> None:
    """Its disk got more since than any snapshot has; then it is paused where it was put."""
    guest = past.guest
    if end == "stopped":
        guest.in_background("usleep 200000; poweroff -f")
    else:
        os.kill(guest.vmm_pid, signal.SIGKILL)
    eventually("its end", lambda: guest.state == end, WAIT_S)
    with pytest.raises(WrongState, match="--discard"):
        guest.restore(past.snapshot)
    assert guest.state == end
    assert guest.restore(past.snapshot, discard=True).state == "paused"
    assert (guest.inspect().reason, guest.inspect().error) == (None, None)
    guest.resume()
    assert past.is_then()


def test_anothers_snapshot_and_its_own_name(daemon: Daemon, guest: Sandbox) -> None:
    """A fork that is put back to its source's later state stays the machine that it is."""
    with guest.forked() as fork:
        mine = fork.sh("hostname; cat /etc/machine-id")
        digests = guest.rewrite()
        fork.restore(guest.save().snapshot)
        assert fork.digests() == digests
        assert fork.sh("hostname; cat /etc/machine-id") == mine
        assert guest.state == "running"


def test_another_shape_is_refused(daemon: Daemon, guest: Sandbox) -> None:
    """By the part that differs; nothing was changed."""
    larger = daemon.run(memory_bytes=160 * MIB)
    other = larger.save().snapshot
    larger.remove()
    with pytest.raises(SnapshotIncompatible, match="memory_bytes"):
        guest.restore(other)
    assert guest.state == "running"


def test_a_damaged_snapshot_changes_nothing(daemon: Daemon, past: Past) -> None:
    """It is read before anything is given up."""
    daemon.packed(past.snapshot)
    state = daemon.home.snapshot(past.snapshot) / "device-state"
    state.chmod(0o600)
    with state.open("r+b") as file:
        file.write(b"damage")
    pid = past.guest.vmm_pid
    with pytest.raises(RestoreFailed, match="damaged") as failed:
        past.guest.restore(past.snapshot, discard=True)
    assert failed.value.fields["state"] == "running"
    assert past.guest.vmm_pid == pid
    assert past.guest.digests() == past.now


def test_one_that_fails_after_its_save_goes_on(daemon: Daemon, past: Past) -> None:
    """Paused by then: it is resumed where it was, and the error names what was saved."""
    tap = Tap(daemon.home)
    tap.fail(before_step("restore", "point"))
    with pytest.raises(DiapauseError):
        past.guest.restore(past.snapshot)
    tap.clear()
    eventually("its going on", lambda: past.guest.state in ("running", "paused"), WAIT_S)
    past.guest.resume()
    assert past.guest.digests() == past.now
    past.guest.counts_beyond(past.count)


def test_one_that_cannot_be_resumed_is_paused(daemon: Daemon, past: Past) -> None:
    """There and back fail alike here; nothing is lost, and the error says where it is."""
    tap = Tap(daemon.home)
    tap.fail(before_step("resume", "load"))
    with pytest.raises(DiapauseError):
        past.guest.restore(past.snapshot)
    tap.clear()
    assert past.guest.state == "paused"
    assert past.guest.resume().warm
    assert past.guest.digests() in (past.now, past.then)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_killed_in_a_restore(daemon: Daemon, past: Past, place: Place) -> None:
    """As it was, or paused at one of the two."""
    guest = past.guest
    kill_at(daemon, place, lambda: guest.restore(past.snapshot))
    at = PLACES.index(place)
    before_the_point = at <= Restore.steps.index("point")
    saved = at == Restore.steps.index("point")
    assert guest.state == ("running" if before_the_point and not saved else "paused")
    eventually("the end of other VMMs", lambda: _only_named(daemon), WAIT_S)
    guest.resume()
    assert guest.digests() == (past.now if before_the_point else past.then)
    digests = guest.rewrite()
    with guest.forked(guest.save().snapshot) as fork:
        assert fork.digests() == digests


def _only_named(daemon: Daemon) -> bool:
    rows = [daemon.client.inspect(row.sandbox) for row in daemon.client.sandboxes(everything=True)]
    return set(daemon.vmms()) == {row.vmm.pid for row in rows if row.vmm is not None}
