"""Captures that fail half-way, one after the other: the next one that works is exact.

A save re-arms tracking before it is committed, so one that fails afterwards has made the VMM forget
what it held: its pages belong into the next capture, wherever they lie.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import DiapauseError
from diapause.model import GcRequest
from diapause.sandbox.pause import Pause, Save
from diapause.units import MIB
from tests.framework.catalog_tap import Place, Tap, at_snapshot, before_step
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Aside, Daemon, Sandbox

pytestmark = pytest.mark.vm

SAVE_PLACES = [*(before_step("save", step) for step in Save.steps), at_snapshot()]
PAUSE_PLACES = [
    *(before_step("pause", step) for step in Pause.steps if step not in ("release", "publish")),
    at_snapshot(),
]
# More than this of dirty pages spills: the buffer is half of what is free on its file system.
SMALL_BUFFERS_BYTES = 20 * MIB
SPILLING_KIB = 24 * 1024


def _name(place: Place) -> str:
    return place.name.replace(" ", "-")


def fail_at(daemon: Daemon, place: Place, guest: Sandbox, verb: str) -> None:
    """The verb fails there; the guest goes on, and nothing but what is needed is left."""
    value, parent = guest.counted(), guest.inspect().parent
    tap = Tap(daemon.home)
    tap.fail(place)
    with pytest.raises(DiapauseError):
        getattr(guest, verb)("disk")
    tap.clear()
    found = guest.inspect()
    assert (found.state, found.parent, found.error) == ("running", parent, None)
    guest.counts_beyond(value)
    assert not list(daemon.home.captures.iterdir())
    left = {path.suffix for path in daemon.home.buffers.iterdir()}
    assert left <= {".unmerged"}


def check_exact(guest: Sandbox, digests: str) -> None:
    """The next save, and the pause after it."""
    value = guest.counted()
    saved = guest.save("disk")
    with guest.forked(saved.snapshot) as fork:
        assert fork.digests() == digests
        fork.counts_beyond(value - 1)
    guest.pause()
    guest.resume()
    assert guest.digests() == digests
    guest.counts_beyond(value)


@pytest.fixture
def counting(guest: Sandbox) -> Sandbox:
    """A guest that counts and was saved: its next capture is a tracked one, and the only one."""
    guest.start_counter()
    guest.rewrite()
    guest.save()
    captures = guest.daemon.home.captures
    eventually("the end of the packing", lambda: not list(captures.iterdir()), WAIT_S)
    return guest


@pytest.mark.parametrize("place", SAVE_PLACES, ids=_name)
def test_a_save_that_fails(daemon: Daemon, counting: Sandbox, place: Place) -> None:
    """Twice, with a file rewritten before each: the next one has both."""
    first = counting.rewrite()
    fail_at(daemon, place, counting, "save")
    assert counting.sh("cp /tmp/file /tmp/first; cp /data/file /data/first; sync") == ""
    digests = counting.rewrite()
    assert digests != first
    fail_at(daemon, place, counting, "save")
    check_exact(counting, digests)
    kept = counting.sh("sha256sum /tmp/first /data/first").split()
    assert {kept[0], kept[2]} == {first.split()[0]}


@pytest.mark.parametrize("place", PAUSE_PLACES, ids=_name)
def test_a_pause_that_fails(daemon: Daemon, counting: Sandbox, place: Place) -> None:
    """The guest goes on where it stood; the next capture is exact."""
    digests = counting.rewrite()
    fail_at(daemon, place, counting, "pause")
    check_exact(counting, digests)


def test_the_first_capture_of_a_guest_fails(daemon: Daemon, guest: Sandbox) -> None:
    """Its pages were known by being private, and are no longer once tracking was armed."""
    guest.start_counter()
    digests = guest.rewrite()
    fail_at(daemon, at_snapshot(), guest, "save")
    check_exact(guest, digests)


# -- what did not fit the buffer ------------------------------------------------------------


@pytest.fixture
def small_buffers(daemon: Daemon) -> Iterator[Path]:
    """Little room for buffers: a capture of more spills to its file."""
    place = daemon.home.buffers
    assert not list(place.iterdir())
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BUFFERS_BYTES},mode=700", "tmpfs"]
    subprocess.run([*command, str(place)], check=True)
    yield place
    eventually("the end of what uses the buffers", lambda: not list(place.iterdir()))
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def spilling(counting: Sandbox, daemon: Daemon) -> Iterator[str]:
    """A guest that has written more than the buffers hold; its digests."""
    counting.sh(f"head -c {SPILLING_KIB}k /dev/urandom >/tmp/large; sha256sum /tmp/large >/tmp/sum")
    yield counting.rewrite()
    (daemon.home.buffers / f"{counting.id}.unmerged").unlink(missing_ok=True)


def check_large(guest: Sandbox) -> None:
    """The large file is what it was."""
    assert guest.sh("sha256sum -c /tmp/sum").strip().endswith("OK")


def test_a_save_that_spills_is_exact(small_buffers: Path, counting: Sandbox, spilling: str) -> None:
    """What did not fit was written while the guest stood."""
    saved = counting.save()
    assert saved.phases_ms["spill"] > 0
    assert saved.dirty_pages * 4096 > SMALL_BUFFERS_BYTES
    with counting.forked(saved.snapshot) as fork:
        check_large(fork)
        assert fork.digests() == spilling
    counting.daemon.packed(saved.snapshot)


def test_a_save_that_spilled_and_failed(
    daemon: Daemon, small_buffers: Path, counting: Sandbox, spilling: str
) -> None:
    """What was forgotten is known to nobody: the next one compares all of RAM."""
    fail_at(daemon, at_snapshot(), counting, "save")
    saved = counting.save()
    assert saved.dirty_source == "compared"
    with counting.forked(saved.snapshot) as fork:
        check_large(fork)
        assert fork.digests() == spilling
    assert counting.save().dirty_source == "tracked"


def test_a_failed_save_that_fitted_before_one_that_spilled(
    daemon: Daemon, small_buffers: Path, counting: Sandbox
) -> None:
    """The first one's list must not stand for the second's."""
    fail_at(daemon, at_snapshot(), counting, "save")
    assert list(small_buffers.glob("*.unmerged"))
    counting.sh(f"head -c {SPILLING_KIB}k /dev/urandom >/tmp/large; sha256sum /tmp/large >/tmp/sum")
    digests = counting.rewrite()
    fail_at(daemon, at_snapshot(), counting, "save")
    saved = counting.save()
    with counting.forked(saved.snapshot) as fork:
        check_large(fork)
        assert fork.digests() == digests
    daemon.packed(saved.snapshot)


def test_a_pause_killed_after_a_save_that_spilled(
    daemon: Daemon, small_buffers: Path, counting: Sandbox, spilling: str
) -> None:
    """Recovery of the pause takes the mark of the save for nobody's but the save's."""
    fail_at(daemon, at_snapshot(), counting, "save")
    tap = Tap(daemon.home)
    tap.hold(before_step("pause", "keep"))
    call = Aside(counting.pause)
    tap.wait_held()
    daemon.kill()
    assert call.wait() is not None
    tap.clear()
    saved = counting.save()
    assert saved.dirty_source == "compared"
    with counting.forked(saved.snapshot) as fork:
        check_large(fork)
        assert fork.digests() == spilling
    daemon.packed(saved.snapshot)


@pytest.fixture(autouse=True)
def room(daemon: Daemon) -> Iterator[None]:
    """Flat files are as large as a guest's memory, and none is in use between two tests."""
    yield
    daemon.client.gc(GcRequest())
