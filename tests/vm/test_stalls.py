"""A guest whose blob can't be served: it waits, and is seen to wait; it goes on, or is killed.

The blob is damaged on the disk, or lies with a peer that goes away. Where a guest has to wait until
a test has done something, the bound is long; where it has to be killed, it is short.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from diapause.errors import DiapauseError
from diapause.guest.images import Image
from diapause.model import CheckRequest, ResumeRequest, Stalled
from tests.framework.blob_peer import BlobPeer, Mode, blob_peer
from tests.framework.blobs import damage
from tests.framework.fake_home import eventually
from tests.framework.run_served import served_command
from tests.framework.sandbox import WAIT_S, Aside, Daemon, Sandbox, real_home
from tests.vm.test_seen import value

pytestmark = pytest.mark.vm

ONDEMAND, COPY = ResumeRequest(memory_mode="ondemand"), ResumeRequest(memory_mode="copy")
LONG_S, SHORT_S = 600.0, 2.0
# What a read of a peer takes at most, with all its requests: it is the least that is waited.
REMOTE_S = 12.0


@contextlib.contextmanager
def served(image: Image, stall_s: float, peer: BlobPeer | None = None) -> Iterator[Daemon]:
    """A daemon whose pager waits so long, in a home of its own."""
    environment = {"TEST_STALL_S": str(stall_s)}
    if peer is not None:
        environment["TEST_BLOBS_URL"] = peer.url
    with real_home(image) as place:
        if peer is not None:
            peer.directory = place.home.builds
        yield Daemon(place.home, environment, command=served_command)


def paused_with_files(daemon: Daemon) -> tuple[Sandbox, str, str, str]:
    """A paused guest: itself, its snapshot, the digests of its files, the build that has them."""
    guest = daemon.run()
    saved = guest.save("disk").snapshot
    daemon.packed(saved)
    before = daemon.client.inspect_snapshot(saved)
    digests = guest.rewrite(8 * 1024)
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    after = daemon.client.inspect_snapshot(snapshot)
    [own] = set(after.devices[0].builds) - set(before.devices[0].builds)
    return guest, snapshot, digests, own


def ondemand(daemon: Daemon, guest: Sandbox) -> None:
    """It runs on files of the pager."""
    answer = daemon.client.resume(guest.id, ONDEMAND)
    assert answer.memory_mode == "ondemand", answer.notes


def is_stalled(guest: Sandbox) -> Stalled | None:
    """Why it waits, as `inspect` says it."""
    return guest.inspect().stalled


def waits(daemon: Daemon, guest: Sandbox, blob: str) -> None:
    """It is seen to wait: in `inspect`, in `ps`, in the metrics, among the events."""
    eventually("its stall", lambda: is_stalled(guest) is not None, WAIT_S)
    seen = is_stalled(guest)
    assert seen is not None
    assert blob in seen.blob
    assert seen.cause
    [row] = [row for row in daemon.client.sandboxes() if row.sandbox == guest.id]
    assert (row.state, row.stalled is not None) == ("running", True)
    metrics = daemon.client.metrics()
    assert value(metrics, "diapause_stalled") == 1
    assert value(metrics, "diapause_pager_stalls_total") >= 1
    eventually("the event", lambda: blob in _stall_events(daemon, guest), WAIT_S)


def _stall_events(daemon: Daemon, guest: Sandbox) -> str:
    found = [event for event in daemon.client.events() if event.sandbox == guest.id]
    return str([event.detail for event in found if event.kind == "stalled"])


def goes_on(daemon: Daemon, guest: Sandbox, read: Aside, digests: str) -> None:
    """With every byte; nothing waits any more."""
    assert read.result() == digests
    assert guest.state == "running"
    eventually("the end of the stall", lambda: is_stalled(guest) is None, WAIT_S)
    assert all(row.stalled is None for row in daemon.client.sandboxes())


def is_killed(guest: Sandbox, read: Aside, blob: str) -> None:
    """Its end, and why; what it read meanwhile is no answer."""
    eventually("its end", lambda: guest.state == "failed", WAIT_S)
    assert blob in (guest.inspect().reason or "")
    assert isinstance(read.wait(), (DiapauseError, AssertionError))


def with_a_copy(daemon: Daemon) -> tuple[Sandbox, str, str, str]:
    """As `paused_with_files`; its pages lie in a flat file as well."""
    guest, first, digests, own = paused_with_files(daemon)
    daemon.client.resume(guest.id, COPY)
    assert (daemon.home.flat_of(first) / "memory").exists()
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    return guest, snapshot, digests, own


def repair(daemon: Daemon, build: str) -> None:
    """`check --repair` finds it and makes it again."""
    found = daemon.client.check(CheckRequest(repair=True)).damage
    [mended] = [damage for damage in found if damage.blob == f"builds/{build}"]
    assert "packed again" in (mended.repaired or ""), mended


def test_a_build_that_is_repaired_in_time(tiny_image: Image) -> None:
    """The guest waits, is seen to wait, and goes on with the right bytes."""
    with served(tiny_image, LONG_S) as daemon:
        guest, _, digests, own = with_a_copy(daemon)
        ondemand(daemon, guest)
        damage(daemon.home.builds / own)
        read = Aside(guest.digests)
        waits(daemon, guest, own)
        repair(daemon, own)
        goes_on(daemon, guest, read, digests)


def test_a_build_that_is_repaired_too_late(tiny_image: Image) -> None:
    """The VMM is killed with the build's name; repaired, the snapshot can be resumed again."""
    with served(tiny_image, SHORT_S) as daemon:
        guest, snapshot, digests, own = with_a_copy(daemon)
        ondemand(daemon, guest)
        damage(daemon.home.builds / own)
        read, began = Aside(guest.digests), time.monotonic()
        is_killed(guest, read, own)
        assert time.monotonic() - began >= SHORT_S
        repair(daemon, own)
        with guest.forked(snapshot) as fork:
            assert fork.digests() == digests


@pytest.mark.parametrize("how", ["closed", "silent", "failing"])
def test_a_peer_that_comes_back(tiny_image: Image, how: Mode) -> None:
    """Memory and disks lie with a peer alone: it goes away, the guest waits; it comes back."""
    with blob_peer() as peer, served(tiny_image, LONG_S, peer) as daemon:
        guest, _, digests, _ = paused_with_files(daemon)
        ondemand(daemon, guest)
        assert peer.served > 0
        peer.become(how)
        read = Aside(guest.digests)
        waits(daemon, guest, "builds/")
        peer.become("there")
        goes_on(daemon, guest, read, digests)


@pytest.mark.parametrize("how", ["closed", "silent", "failing"])
def test_a_peer_that_stays_away(tiny_image: Image, how: Mode) -> None:
    """Its guest is killed at the bound; its snapshot can be resumed when the peer is there."""
    with blob_peer() as peer, served(tiny_image, SHORT_S, peer) as daemon:
        guest, snapshot, digests, _ = paused_with_files(daemon)
        ondemand(daemon, guest)
        peer.become(how)
        read, began = Aside(guest.digests), time.monotonic()
        is_killed(guest, read, "builds/")
        took = time.monotonic() - began
        assert SHORT_S <= took < SHORT_S + REMOTE_S + 60.0, took  # 60 s: a busy machine
        peer.become("there")
        with guest.forked(snapshot) as fork:
            assert fork.digests() == digests
