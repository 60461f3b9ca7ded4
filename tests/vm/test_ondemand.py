"""Guests whose memory and disks are served on demand: real ones, resumed and forked."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from diapause.driver.process import find_by_argument
from diapause.errors import BlobDamaged, BlobMissing, RestoreFailed
from diapause.model import CaptureRequest, GcRequest, ResumeRequest
from diapause.pager.client import Pager
from diapause.pager.process import name_of
from diapause.units import KIB, MIB
from tests.framework.fake_home import eventually
from tests.framework.pagers import kill_both
from tests.framework.sandbox import MEMORY_BYTES, WAIT_S, Daemon, Sandbox

pytestmark = pytest.mark.vm

ONDEMAND = ResumeRequest(memory_mode="ondemand")
DROP = "echo 3 >/proc/sys/vm/drop_caches"


def test_a_guest_runs_before_its_memory_is_read(daemon: Daemon, guest: Sandbox) -> None:
    """Nothing is materialized; every byte is as it was; it pauses and resumes again."""
    guest.start_counter()
    digests, before = guest.rewrite(), guest.counted()
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    answer = daemon.client.resume(guest.id, ONDEMAND)
    assert (answer.warm, answer.memory_mode) == (True, "ondemand"), answer.notes
    maps = Path(f"/proc/{guest.vmm_pid}/maps").read_text()
    assert f"{snapshot}.memory" in maps
    assert "/flat/" not in maps
    guest.counts_beyond(before)
    assert guest.digests() == digests
    served = daemon.client.inspect(guest.id).served
    assert served is not None
    memory = next(file for file in served["files"] if file["name"].endswith(".memory"))
    read = sum(reads["bytes"] for reads in memory["seen"]["reads"].values())
    assert 0 < read < MEMORY_BYTES, "all of the memory was read"
    assert memory["stalled"] is None
    digests = guest.rewrite(64)
    guest.pause("disk")
    assert daemon.client.resume(guest.id, ONDEMAND).memory_mode == "ondemand"
    assert guest.digests() == digests


@pytest.mark.parametrize("who", ["pager", "keeper"])
def test_one_of_the_two_dies_and_the_guest_only_waits(
    daemon: Daemon, guest: Sandbox, who: str
) -> None:
    digests = guest.rewrite()
    guest.pause("process")
    daemon.client.resume(guest.id, ONDEMAND)
    pager = Pager(daemon.home)
    for _ in range(5):
        pair = pager.pair(start=False)
        dead = pair.pid if who == "pager" else pair.keeper_pid
        os.kill(dead, signal.SIGKILL)
        assert guest.digests() == digests
        eventually("another one", partial(_is_replaced, pager, dead), WAIT_S)
    assert guest.state == "running"
    pager.close()


def _is_replaced(pager: Pager, dead: int) -> bool:
    pair = pager.pair(start=False)
    return dead not in (pair.pid, pair.keeper_pid)


def test_when_both_die_the_guest_ends_and_its_snapshot_can_be_resumed(
    daemon: Daemon, guest: Sandbox
) -> None:
    digests = guest.rewrite()
    snapshot = guest.pause("disk").snapshot
    daemon.client.resume(guest.id, ONDEMAND)
    kill_both(daemon)
    eventually("its end", lambda: guest.state == "failed", WAIT_S)
    assert "keeper" in (daemon.client.inspect(guest.id).reason or "")
    with guest.forked(snapshot) as fork:
        assert fork.digests() == digests


def test_without_a_pager_memory_is_copied_and_it_is_said(daemon: Daemon, guest: Sandbox) -> None:
    """One that can't be started: something lies where its socket has to be."""
    digests = guest.rewrite()
    guest.pause("disk")
    daemon.client.resume(guest.id, ONDEMAND)
    guest.pause("disk")
    kill_both(daemon)
    daemon.home.pager_socket.unlink()
    daemon.home.pager_socket.mkdir()
    try:
        answer = daemon.client.resume(guest.id, ONDEMAND)
    finally:
        daemon.home.pager_socket.rmdir()
    assert answer.memory_mode == "copy"
    assert any("can't be started" in note and "It was copied." in note for note in answer.notes)
    assert guest.digests() == digests


def test_a_new_daemon_takes_its_guests_up(daemon: Daemon, guest: Sandbox) -> None:
    """Served from a capture that is not packed when it dies, from builds afterwards."""
    guest.start_counter()
    digests, before = guest.rewrite(), guest.counted()
    snapshot = guest.pause("process").snapshot
    daemon.client.resume(guest.id, ONDEMAND)
    daemon.kill()
    guest.counts_beyond(before)
    daemon.packed(snapshot)
    assert not daemon.home.capture(snapshot).exists()
    assert not list(daemon.home.served.glob(f"{snapshot}.*"))
    with contextlib.closing(Pager(daemon.home)) as pager:
        os.kill(pager.pair(start=False).pid, signal.SIGKILL)  # the next one reads everything anew
    assert guest.digests() == digests


def test_a_removed_snapshot_is_served_as_long_as_a_guest_runs_on_it(
    daemon: Daemon, guest: Sandbox
) -> None:
    """Also by the next pager; then gc takes it and its files."""
    digests = guest.rewrite()
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    daemon.client.resume(guest.id, ONDEMAND)
    assert guest.digests() == digests
    daemon.client.save(guest.id, CaptureRequest())
    daemon.client.remove_snapshot(snapshot)
    daemon.client.gc(GcRequest())
    with contextlib.closing(Pager(daemon.home)) as pager:
        pager.pair(start=False)
        assert f"{snapshot}.memory" in pager.names()
        os.kill(pager.pair(start=False).pid, signal.SIGKILL)
        assert guest.digests() == digests
        daemon.client.remove(guest.id, force=True)
        daemon.client.gc(GcRequest())
        assert f"{snapshot}.memory" not in pager.names()


def test_a_cold_resume_stands_on_files_of_the_pager(daemon: Daemon, guest: Sandbox) -> None:
    """Its own disk over the last snapshot's, whose data stays although the snapshot was removed."""
    digests = guest.rewrite()
    snapshot = guest.save("disk").snapshot
    guest.sh("echo after >/data/said; sync")
    os.kill(guest.vmm_pid, signal.SIGKILL)
    eventually("its end", lambda: guest.state == "failed", WAIT_S)
    booted = guest.resume(cold=True)
    assert (booted.warm, booted.disk, booted.notes) == (False, "own", [])
    assert [*daemon.home.flat.iterdir()] == []
    assert served_names(daemon, guest) == [f"{snapshot}.disk0"]
    daemon.packed(guest.save("disk").snapshot)
    daemon.client.remove_snapshot(snapshot)
    assert snapshot not in daemon.client.gc(GcRequest()).snapshots
    disk = f"{DROP}; sha256sum /data/file; cat /data/said"
    assert guest.sh(disk).splitlines() == [digests.splitlines()[1], "after"]
    guest.pause("disk")
    assert snapshot in daemon.client.gc(GcRequest()).snapshots
    guest.resume()
    assert guest.sh(disk).splitlines() == [digests.splitlines()[1], "after"]


def served_names(daemon: Daemon, guest: Sandbox) -> list[str]:
    served = daemon.client.inspect(guest.id).served
    assert served is not None
    return sorted(file["name"] for file in served["files"])


def test_a_restored_guest_is_served(daemon: Daemon, guest: Sandbox) -> None:
    """Back and forth; nothing is materialized."""
    first, before = guest.rewrite(), guest.save("disk").snapshot
    second = guest.rewrite(64)
    answer = guest.restore(before)
    assert (answer.state, answer.notes) == ("running", [])
    assert guest.digests() == first
    assert served_names(daemon, guest) == [f"{before}.disk0", f"{before}.memory"]
    assert answer.saved is not None
    assert guest.restore(answer.saved, discard=True).state == "running"
    assert guest.digests() == second
    assert [*daemon.home.flat.iterdir()] == []


def test_nothing_is_given_up_for_a_snapshot_that_is_damaged(daemon: Daemon, guest: Sandbox) -> None:
    """With --discard all of it is read first: there would be no way back."""
    guest.rewrite()
    snapshot = guest.save("disk").snapshot
    daemon.packed(snapshot)
    digests, vmm = guest.rewrite(64), guest.vmm_pid
    blob = own_build(daemon, snapshot)
    with flipped_everywhere(blob), pytest.raises(RestoreFailed, match=blob.name):
        guest.restore(snapshot, discard=True)
    assert (guest.state, guest.vmm_pid) == ("running", vmm)
    assert guest.digests() == digests


def test_a_missing_build_is_seen_before_anything_starts(daemon: Daemon, guest: Sandbox) -> None:
    digests = guest.rewrite()
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    blob = own_build(daemon, snapshot)
    away = blob.rename(blob.with_name("away"))
    try:
        with pytest.raises(BlobMissing, match=blob.name):
            guest.resume()
        assert guest.state == "paused"
    finally:
        away.rename(blob)
    guest.resume()
    assert guest.digests() == digests


def own_build(daemon: Daemon, snapshot: str) -> Path:
    """A build of its memory that its parent does not have."""
    rows = {row.id: row for row in daemon.client.snapshots()}
    parent = rows.get(rows[snapshot].parent or "")
    older = {build for device in parent.devices for build in device.builds} if parent else set()
    [memory] = [device for device in rows[snapshot].devices if device.name == "memory"]
    return daemon.home.builds / next(build for build in memory.builds if build not in older)


def test_the_pair_ends_with_its_daemon_unless_a_guest_runs_on_it(
    daemon: Daemon, guest: Sandbox
) -> None:
    digests = guest.rewrite()
    pair = find_by_argument(name_of(daemon.home))
    assert len(pair) == 2
    daemon.stop()
    assert guest.digests() == digests
    assert find_by_argument(name_of(daemon.home)) == pair
    guest.pause()
    daemon.stop()
    eventually("their end", lambda: not find_by_argument(name_of(daemon.home)), WAIT_S)
    guest.resume()
    assert guest.digests() == digests


def test_a_ready_snapshot_is_served(daemon: Daemon) -> None:
    flats = set(daemon.home.flat.iterdir())
    first, _ = daemon.run_as_asked()
    first.remove()
    second, answer = daemon.run_as_asked()
    assert (answer.warm, answer.notes) == (True, [])
    assert len(served_names(daemon, second)) == 2
    assert set(daemon.home.flat.iterdir()) == flats
    second.remove()


def test_a_damaged_build_ends_the_guest_with_its_name(daemon: Daemon, guest: Sandbox) -> None:
    """The guest never sees it: it waits, then its VMM is killed; mended, it can be resumed."""
    digests = guest.rewrite()
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    own = daemon.client.inspect_snapshot(snapshot).devices[0].builds
    assert own
    blobs = [daemon.home.builds / build for build in own]
    with contextlib.ExitStack() as damage:
        for blob in blobs:
            damage.enter_context(flipped_everywhere(blob))
        with contextlib.suppress(BlobDamaged):  # whichever page is wanted first
            daemon.client.resume(guest.id, ONDEMAND)
        eventually("its end", lambda: guest.state in ("failed", "paused"), WAIT_S)
        told = daemon.home.pager_log.read_text()
        assert any(f"builds/{blob.name}: " in told for blob in blobs)
    if guest.state == "paused":
        daemon.client.resume(guest.id, ONDEMAND)
        assert guest.digests() == digests
    with guest.forked(snapshot) as fork:
        assert fork.digests() == digests


@contextlib.contextmanager
def flipped_everywhere(blob: Path) -> Iterator[None]:
    """Every frame of a build is damaged, its table is not: in a copy that takes its place."""
    before = blob.read_bytes()
    table = int.from_bytes(before[-48:-40], "little")
    frames = bytes(byte ^ 1 for byte in before[32:table])
    _replace(blob, before[:32] + frames + before[table:])
    try:
        yield
    finally:
        _replace(blob, before)


def _replace(blob: Path, data: bytes) -> None:
    fresh = blob.with_name(f"{blob.name}.fresh")
    fresh.write_bytes(data)
    fresh.replace(blob)


def test_what_a_guest_touched_is_brought_ahead_of_the_next(daemon: Daemon, guest: Sandbox) -> None:
    """Recorded with the snapshot when the guest is paused, used by its forks, and by what comes
    after it; right to the byte."""
    digests = guest.rewrite(4096)
    first = guest.pause("disk").snapshot
    daemon.packed(first)
    for trace in daemon.home.traces.glob("*.memory"):
        trace.unlink()  # of what it was forked from, where that was served
    answer = daemon.client.resume(guest.id, ONDEMAND)
    assert (answer.prefetched_pages, answer.used_pages) == (0, 0)
    assert answer.faults is not None
    assert sum(answer.faults.values()) > 0
    assert guest.digests() == digests
    second = guest.pause("disk").snapshot
    trace = daemon.home.traces / f"{first}.memory"
    assert trace.stat().st_size > 32 + 8 * (2 * 4 * MIB // (64 * KIB))
    daemon.packed(second)
    answer = daemon.client.resume(guest.id, ONDEMAND)
    assert answer.prefetched_pages is not None
    assert answer.used_pages is not None
    assert 0 < answer.used_pages <= answer.prefetched_pages
    assert guest.digests() == digests
    guest.pause("disk")
    assert (daemon.home.traces / f"{second}.memory").exists()
    daemon.client.resume(guest.id, ONDEMAND)
    assert guest.digests() == digests


def test_the_pager_says_whom_it_serves(daemon: Daemon, guest: Sandbox) -> None:
    guest.pause("disk")
    daemon.client.resume(guest.id, ONDEMAND)
    answer = daemon.client.pager()
    [mine] = [one for one in answer.sandboxes if one.sandbox == guest.id]
    assert (mine.pid, mine.handed, mine.ended, mine.stalled) == (guest.vmm_pid, False, False, None)
    assert answer.running
    assert answer.replaceable
    assert answer.resident_bytes is not None
    assert 0 < answer.resident_bytes < 60 * MIB


def test_a_trace_goes_with_its_snapshot(daemon: Daemon, guest: Sandbox) -> None:
    first = guest.pause("disk").snapshot
    daemon.client.resume(guest.id, ONDEMAND)
    second = guest.pause("disk").snapshot
    trace = daemon.home.traces / f"{first}.memory"
    assert trace.exists()
    guest.remove()
    for snapshot in (first, second):
        daemon.client.remove_snapshot(snapshot)
    daemon.client.gc(GcRequest())
    assert not trace.exists()
