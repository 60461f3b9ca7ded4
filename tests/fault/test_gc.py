"""gc on real guests: what is needed stays and works, what is not goes, whatever kills it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import InUse, SnapshotNotFound
from diapause.model import GcAnswer, GcRequest
from diapause.sandbox.upkeep.collect import Gc
from tests.framework.catalog_tap import Tap, at_end, before_step
from tests.framework.sandbox import Aside, Daemon, Sandbox

pytestmark = pytest.mark.vm


def gc(daemon: Daemon, *, dry_run: bool = False) -> GcAnswer:
    return daemon.client.gc(GcRequest(dry_run=dry_run))


def shared_files(daemon: Daemon) -> set[Path]:
    home = daemon.home
    places = (home.builds, home.snapshots, home.flat, home.captures, home.templates)
    return {path for place in places for path in place.rglob("*")}


def names(daemon: Daemon, kind: str) -> set[str]:
    return {item.name for item in gc(daemon, dry_run=True).items if item.kind == kind}


def forget(daemon: Daemon, sandbox: str, root: str) -> None:
    """Write another root into a sandbox's row."""
    Tap(daemon.home).write(
        f"UPDATE sandboxes SET record = CAST(json_set(record, '$.root', {root}) AS BLOB) "
        f"WHERE id = '{sandbox}'"
    )


@pytest.fixture
def three(daemon: Daemon, guest: Sandbox) -> Iterator[tuple[list[str], list[str]]]:
    """Three snapshots of a guest that goes on, packed, and the digests in each."""
    digests, saved = [], []
    for _ in range(3):
        digests.append(guest.rewrite())
        saved.append(guest.save("disk").snapshot)
        daemon.packed(saved[-1])
    yield saved, digests
    for one in saved:
        if daemon.client.snapshots() and any(row.id == one for row in daemon.client.snapshots()):
            daemon.client.remove_snapshot(one)


def test_what_is_removed_goes_and_the_rest_works(
    daemon: Daemon, guest: Sandbox, three: tuple[list[str], list[str]]
) -> None:
    """The middle of a lineage: its children never need it, the guest goes on and is saved."""
    [first, second, third], digests = three
    builds = {b for d in daemon.client.inspect_snapshot(third).devices for b in d.builds}
    daemon.client.remove_snapshot(second)
    daemon.client.remove_snapshot(first)
    with pytest.raises(SnapshotNotFound):
        daemon.client.inspect_snapshot(second)
    assert daemon.client.remove_snapshot(second).already == [second]
    planned = gc(daemon, dry_run=True)
    assert (daemon.home.snapshots / second).exists()
    done = gc(daemon)
    assert [item.name for item in done.items] == [item.name for item in planned.items]
    assert {first, second} <= set(done.snapshots)
    assert not (daemon.home.snapshots / second).exists()
    assert all((daemon.home.builds / build).exists() for build in builds)
    assert done.freed_bytes > 0
    with guest.forked(third) as fork:
        assert fork.digests() == digests[2]
    last = guest.rewrite()
    saved = guest.save("disk").snapshot
    daemon.packed(saved)
    gc(daemon)
    with guest.forked(saved) as fork:
        assert fork.digests() == last
    daemon.client.remove_snapshot(saved)


def test_a_running_guest_keeps_what_it_stands_on(
    daemon: Daemon, guest: Sandbox, three: tuple[list[str], list[str]]
) -> None:
    """Its files, not its name: the next capture is over it, and from then on nobody needs it."""
    saved, digests = three
    [fork] = daemon.fork(saved[2])
    answer = daemon.client.remove_snapshot(saved[2])
    assert any(fork.id in note for note in answer.notes)
    assert gc(daemon).snapshots.count(saved[2]) == 0
    assert fork.digests() == digests[2]
    fork.pause()
    fork.resume()
    assert fork.digests() == digests[2]
    fork.remove()
    guest.rewrite()
    daemon.packed(guest.save().snapshot)
    assert saved[2] in gc(daemon).snapshots
    assert not (daemon.home.flat / saved[2]).exists()


def test_what_a_paused_sandbox_resumes_from_is_refused(daemon: Daemon, guest: Sandbox) -> None:
    digests = guest.rewrite()
    paused = guest.pause("disk").snapshot
    with pytest.raises(InUse, match=guest.id) as caught:
        daemon.client.remove_snapshot(paused)
    assert "rm" in caught.value.advice
    gc(daemon)
    guest.resume()
    assert guest.digests() == digests
    assert daemon.client.remove_snapshot(paused).removed == [paused]


def test_a_capture_that_is_not_packed_keeps_its_parent(daemon: Daemon, guest: Sandbox) -> None:
    """Its provisional header is over the parent's: both stay until it is packed."""
    guest.rewrite()
    first = guest.save("process").snapshot
    daemon.packed(first)
    tap = Tap(daemon.home)
    with tap.packing_fails():
        digests = guest.rewrite()
        second = guest.pause("disk").snapshot
        note = daemon.client.remove_snapshot(first).notes
        assert any(second in line for line in note)
        assert first not in gc(daemon).snapshots
        assert guest.resume().source == "capture"
        assert guest.digests() == digests
        daemon.client.remove_snapshot(second)
        guest.remove()
    gc(daemon)
    assert not (daemon.home.captures / second).exists()
    assert not (daemon.home.snapshots / first).exists()


def test_live_mappings_count_whatever_the_rows_say(daemon: Daemon, guest: Sandbox) -> None:
    """The kernel says what a VMM maps: a row that forgot it costs nobody a file."""
    guest.pause()
    assert guest.resume(memory_mode="copy").memory_mode == "copy"
    root = daemon.record(guest.id).root
    assert root is not None
    forget(daemon, guest.id, "NULL")
    try:
        gc(daemon)
        assert (daemon.home.flat / root / "memory").exists()
        assert any(daemon.home.templates.iterdir())
    finally:
        forget(daemon, guest.id, f"'{root}'")


@pytest.mark.parametrize("place", [*Gc.steps, "end"])
def test_a_daemon_killed_at_any_step(
    daemon: Daemon, guest: Sandbox, three: tuple[list[str], list[str]], place: str
) -> None:
    """The next gc finishes; nothing is lost, nothing stays, and no row outlives its files."""
    saved, digests = three
    for one in saved[:2]:
        daemon.client.remove_snapshot(one)
    tap = Tap(daemon.home)
    tap.hold(at_end("gc") if place == "end" else before_step("gc", place))
    aside = Aside(lambda: gc(daemon))
    tap.wait_held()
    daemon.kill()
    assert aside.wait() is not None
    tap.clear()
    gc(daemon)
    assert gc(daemon, dry_run=True).items == []
    assert not list(daemon.home.tmp.iterdir())
    assert {path.name for path in daemon.home.snapshots.iterdir()} == {
        row.id for row in daemon.client.snapshots() if row.state == "packed"
    }
    with guest.forked(saved[2]) as fork:
        assert fork.digests() == digests[2]


def test_an_empty_home_leaves_nothing_behind(daemon: Daemon, booted: Sandbox) -> None:
    """With the sandboxes and the snapshots gone, all shared data goes; and a run works again."""
    for row in daemon.client.sandboxes(everything=True):
        daemon.client.remove(row.sandbox, force=True)
    for one in daemon.client.snapshots():
        daemon.client.remove_snapshot(one.id)
    gc(daemon)
    assert shared_files(daemon) == set()
    again = daemon.run()
    digests = again.rewrite()
    again.pause()
    again.resume()
    assert again.digests() == digests
    again.remove()
