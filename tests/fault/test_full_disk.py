"""A full disk: a capture fails with what it needed, the guest goes on, nothing of it stays.

Earlier snapshots are as they were, and with room again the next capture works and is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diapause.errors import NotEnoughSpace
from diapause.guest.images import Image
from diapause.model import GcRequest
from diapause.units import MIB
from tests.framework.catalog_tap import Tap, before_step
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Aside, Daemon, Sandbox, remove_closed
from tests.framework.small_disk import SmallDisk, daemon_of, home_on_small_disk

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def disk(tiny_image: Image) -> Iterator[SmallDisk]:
    """A small file system with a home."""
    with home_on_small_disk(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def daemon(disk: SmallDisk) -> Daemon:
    """Its daemon."""
    return daemon_of(disk)


@pytest.fixture(autouse=True)
def room(disk: SmallDisk) -> Iterator[None]:
    """Flat files are as large as a guest's memory, and none is in use between two tests."""
    yield
    disk.empty()
    for flat in disk.home.flat.iterdir():  # in one step: digests are written behind, by name
        remove_closed(flat.rename(disk.home.tmp / f"away-{flat.name}"))


@pytest.fixture
def counting(daemon: Daemon, guest: Sandbox) -> Sandbox:
    """A guest that counts and has a snapshot that is packed and has its flat files."""
    guest.start_counter()
    guest.rewrite()
    saved = guest.save("disk")
    with guest.forked(saved.snapshot):
        daemon.packed(saved.snapshot)
    return guest


def files_of(daemon: Daemon, snapshot: str) -> dict[str, tuple[int, bytes]]:
    """Every file of a packed snapshot and its builds: inode and bytes."""
    home, found = daemon.home, daemon.client.inspect_snapshot(snapshot)
    builds = [home.builds / build for device in found.devices for build in device.builds]
    paths: list[Path] = [*home.snapshot(snapshot).iterdir(), *builds]
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in paths}


def check_failed(daemon: Daemon, guest: Sandbox, verb: Callable[[], object]) -> None:
    """The verb fails for want of space; all else is as it was, but that the guest went on."""
    parent = guest.inspect().parent
    assert parent is not None
    earlier, value = files_of(daemon, parent), guest.counted()
    with pytest.raises(NotEnoughSpace) as caught:
        verb()
    assert caught.value.fields["needed_bytes"]
    assert str(daemon.home.root) in caught.value.message
    assert guest.state == "running"
    assert guest.inspect().parent == parent
    guest.counts_beyond(value)
    assert files_of(daemon, parent) == earlier
    assert not list(daemon.home.captures.iterdir())
    assert not list(daemon.home.tmp.iterdir())
    assert not [path for path in daemon.home.buffers.iterdir() if path.suffix != ".unmerged"]


def check_next(daemon: Daemon, guest: Sandbox, disk: SmallDisk) -> None:
    """With room again: a save and a pause are exact."""
    digests, value = guest.digests(), guest.counted()
    disk.empty()
    saved = guest.save("disk")
    with guest.forked(saved.snapshot) as fork:
        assert fork.digests() == digests
        fork.counts_beyond(value - 1)
    guest.pause()
    guest.resume()
    assert guest.digests() == digests
    guest.counts_beyond(value)


@pytest.mark.parametrize("verb", ["pause", "save"])
@pytest.mark.parametrize("left", [0, 4096, 2 * MIB], ids=["nothing", "a-page", "too-little"])
def test_a_disk_that_is_full_before(
    daemon: Daemon, counting: Sandbox, disk: SmallDisk, verb: str, left: int
) -> None:
    """Refused before anything stops."""
    counting.rewrite()
    disk.fill(left)
    call = getattr(counting, verb)
    check_failed(daemon, counting, lambda: call("disk"))
    check_next(daemon, counting, disk)


@pytest.mark.parametrize("verb", ["pause", "save"])
@pytest.mark.parametrize("left", [0, 1 * MIB], ids=["nothing", "little"])
def test_a_disk_that_fills_up_during_a_capture(
    daemon: Daemon, counting: Sandbox, disk: SmallDisk, verb: str, left: int
) -> None:
    """After the freeze: a save has re-armed by then, and forgets nothing for it."""
    counting.sh("head -c 6000000 /dev/urandom >/tmp/more")
    counting.rewrite()
    call = getattr(counting, verb)

    tap = Tap(disk.home)

    def fill_between() -> None:
        tap.slow(before_step(verb, "keep"))
        aside = Aside(lambda: call("disk"))
        tap.wait_held()
        disk.fill(left)
        aside.result()

    check_failed(daemon, counting, fill_between)
    check_next(daemon, counting, disk)
    tap.clear()


def test_a_disk_too_full_to_pack(daemon: Daemon, counting: Sandbox, disk: SmallDisk) -> None:
    """The snapshot stays a capture, says why, and can be resumed; later it is packed."""
    counting.sh("head -c 8000000 /dev/urandom >/tmp/more")
    digests = counting.rewrite()
    tap = Tap(disk.home)
    tap.slow(before_step("pause", "publish"))
    aside = Aside(lambda: counting.pause("disk"))
    tap.wait_held()
    disk.fill(3 * MIB)
    paused = aside.result()
    eventually(
        "the failed pack",
        lambda: daemon.client.inspect_snapshot(paused.snapshot).error is not None,
        WAIT_S,
    )
    found = daemon.client.inspect_snapshot(paused.snapshot)
    assert found.state == "captured"
    assert found.error is not None
    assert found.error["code"] == "not_enough_space"
    disk.empty()
    tap.clear()
    assert counting.resume().source == "capture"
    assert counting.digests() == digests
    daemon.stop()
    daemon.packed(paused.snapshot)
    assert daemon.client.inspect_snapshot(paused.snapshot).error is None


@pytest.mark.parametrize("verb", ["rm", "snapshot rm", "gc"])
def test_what_frees_space_works_where_not_a_byte_is_left(
    daemon: Daemon, counting: Sandbox, disk: SmallDisk, verb: str
) -> None:
    """Each is the first to be asked for; the guest beside it goes on."""
    counting.rewrite()
    saved = counting.save("disk").snapshot
    daemon.packed(saved)
    [fork] = daemon.fork(saved)
    if verb == "gc":
        daemon.packed(counting.save("disk").snapshot)  # until then it keeps its parent
        fork.remove()
        daemon.client.remove_snapshot(saved)
    eventually("the reserve", disk.home.reserve.exists)
    value = counting.counted()
    disk.fill()
    assert disk.free_bytes() < 4096
    if verb == "rm":
        fork.remove()
        assert fork.id not in {row.sandbox for row in daemon.client.sandboxes(everything=True)}
        assert not disk.home.sandbox(fork.id).exists()
    elif verb == "snapshot rm":
        assert daemon.client.remove_snapshot(saved).removed == [saved]
        assert saved not in {row.id for row in daemon.client.snapshots()}
        fork.remove()
    else:
        done = daemon.client.gc(GcRequest())
        assert saved in done.snapshots
        assert not disk.home.snapshot(saved).exists()
        assert done.freed_bytes > 0
        assert disk.free_bytes() > 0
    counting.counts_beyond(value)


def test_a_guest_that_writes_to_a_full_disk_stands_until_there_is_room(
    daemon: Daemon, counting: Sandbox, disk: SmallDisk
) -> None:
    """QEMU stops it and keeps the request; with room again it goes on, verb or no verb."""
    for verb in ("save", "pause", None):
        counting.sh("head -c 5000000 /dev/urandom >/tmp/more; sha256sum </tmp/more >/tmp/sum")
        value = counting.counted()
        disk.fill()
        counting.in_background("cp /tmp/more /data/more; sync; echo done >/tmp/done")
        eventually("the guest's standing still", lambda: _stands(counting), WAIT_S)
        eventually("what it stands for", lambda: counting.inspect().error is not None)
        with pytest.raises(NotEnoughSpace):
            counting.save("disk")
        disk.empty()
        if verb is not None:
            getattr(counting, verb)("disk")
            counting.resume()
        counting.sh("while [ ! -e /tmp/done ]; do usleep 10000; done; rm /tmp/done")
        counting.sh("echo 3 >/proc/sys/vm/drop_caches; cmp /tmp/more /data/more")
        counting.counts_beyond(value)
        eventually("its being well again", lambda: counting.inspect().error is None)


def _stands(guest: Sandbox) -> bool:
    """A guest that stands answers nothing; one that runs answers in no time."""
    return not Aside(lambda: guest.exec("true")).ends_within(5)
