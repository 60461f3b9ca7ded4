"""A guest that somebody stopped through its VMM's monitor: no verb minds, and it does not stand."""

from __future__ import annotations

import pytest

from diapause.errors import VmmFailed
from diapause.model import RunRequest
from tests.framework import coupled
from tests.framework.fake_home import eventually
from tests.framework.leftovers import nothing_left
from tests.framework.sandbox import DISK_BYTES, MEMORY_BYTES, WAIT_S, Aside
from tests.framework.verbs import Ground

pytestmark = pytest.mark.vm


def test_a_save_takes_it_as_it_stands_and_it_runs_afterwards(ground: Ground) -> None:
    """Stopped just before the frozen section."""
    guest = ground.guest()
    value, digests = coupled.check(guest), guest.rewrite(64)
    ground.daemon.plan("stop", "save/prepare/acted")
    snapshot = guest.save().snapshot
    assert ground.daemon.done == "stop"
    coupled.goes_on(guest, value)
    with guest.forked(snapshot) as fork:
        assert coupled.check(fork) >= value
        assert fork.digests() == digests


def test_a_pause_takes_it_as_it_stands(ground: Ground) -> None:
    """And its resume runs."""
    guest = ground.guest()
    value = coupled.check(guest)
    ground.daemon.plan("stop", "pause/prepare/acted")
    guest.pause()
    assert ground.daemon.done == "stop"
    guest.resume()
    coupled.goes_on(guest, value)


def test_between_verbs_it_is_thawed_with_an_event(ground: Ground) -> None:
    """Stopped when the last verb had done all: nobody owns it."""
    guest = ground.guest()
    value = coupled.check(guest)
    before = _thaws(ground, guest.id)
    ground.daemon.plan("stop", "save/commit/acted")
    guest.save()
    assert ground.daemon.done == "stop"
    coupled.goes_on(guest, value)
    eventually("the event", lambda: _thaws(ground, guest.id) > before, WAIT_S)


def test_a_frozen_guest_stays_frozen(ground: Ground) -> None:
    """Its owner is the verb that froze it."""
    guest = ground.guest()
    before = _thaws(ground, guest.id)
    ground.daemon.client.freeze(guest.id)
    guest.save()  # a second stop, by a verb that takes the lock in its turn
    assert guest.state == "frozen"
    assert _thaws(ground, guest.id) == before
    ground.daemon.client.thaw(guest.id)
    coupled.check(guest)


def test_one_that_stood_while_there_was_no_daemon_is_thawed_with_an_event(ground: Ground) -> None:
    """A daemon killed in its frozen section leaves such a guest."""
    guest = ground.guest()
    value = coupled.check(guest)
    before = _thaws(ground, guest.id)
    ground.daemon.dies_at("save/freeze/stop.1", guest.save)
    coupled.goes_on(guest, value)
    eventually("the event", lambda: _thaws(ground, guest.id) > before, WAIT_S)
    nothing_left(ground.daemon.home)


def test_a_boot_whose_vmm_dies_ends_at_once(ground: Ground) -> None:
    """It does not wait for the agent's bound, which is two minutes."""
    request = RunRequest(memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES, boot=True)
    ground.daemon.plan("vmm", "run/thaw/acted")
    call = Aside(lambda: ground.daemon.client.run(request))
    failure = call.wait()
    assert ground.daemon.done == "vmm"
    assert isinstance(failure, VmmFailed)
    assert "ended" in failure.message


def test_a_packed_child_is_resumed_after_its_parent_was_removed(ground: Ground) -> None:
    """A packed snapshot stands alone."""
    first = ground.fork()
    value = coupled.check(first)
    snapshot = first.save().snapshot
    [second] = ground.daemon.fork(snapshot)
    taken = second.pause().snapshot
    ground.daemon.packed(taken)
    first.remove()
    second.resume()
    coupled.goes_on(second, value)
    second.remove()


def _thaws(ground: Ground, sandbox: str) -> int:
    """How often the daemon noted that it thawed this sandbox for want of an owner."""
    return sum(
        event.kind == "thawed" and event.sandbox == sandbox and "cause" in event.detail
        for event in ground.daemon.client.events()
    )
