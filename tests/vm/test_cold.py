"""Sandboxes that ended, booted on their own disks."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from diapause.errors import BlobDamaged, BlobMissing, DiapauseError, StorageFailed, WrongState
from tests.framework.catalog_tap import Place, Tap, before_step
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox
from tests.framework.strace import failing

pytestmark = pytest.mark.vm


def powered_off(guest: Sandbox) -> None:
    guest.in_background("sync; usleep 200000; poweroff -f")
    eventually("the end of the guest", lambda: guest.state == "stopped", WAIT_S)


def killed(guest: Sandbox) -> None:
    guest.sh("sync")
    os.kill(guest.vmm_pid, signal.SIGKILL)
    eventually("the failure", lambda: guest.state == "failed", WAIT_S)


def on_disk(guest: Sandbox) -> str:
    return guest.sh("cat /data/said").strip()


@pytest.mark.parametrize("end", [powered_off, killed])
def test_a_guest_that_ended_is_booted_on_its_own_disk(guest: Sandbox, end: object) -> None:
    """What it wrote after its last save is there; its memory is not; it kept its name."""
    assert callable(end)
    named = guest.sh("hostname; cat /etc/machine-id")
    saved = guest.save("disk")
    guest.rewrite()
    guest.sh("echo after >/data/said; sync")
    end(guest)
    with pytest.raises(WrongState) as refused:
        guest.resume()
    assert f"diapause resume {guest.id} --cold" in refused.value.advice
    assert saved.snapshot in refused.value.advice
    booted = guest.resume(cold=True)
    assert (booted.warm, booted.disk, booted.notes) == (False, "own", [])
    assert guest.state == "running"
    assert on_disk(guest) == "after"
    assert guest.exec("test", "-e", "/tmp/file").returncode == 1
    assert guest.sh("hostname; cat /etc/machine-id") == named
    captures_are_exact(guest)


def captures_are_exact(guest: Sandbox) -> None:
    """Its first capture is over a memory of zeros, and the disk of its last snapshot."""
    digests = guest.rewrite()
    assert guest.save("disk").dirty_source == "private"
    assert guest.save().dirty_source != "private"
    guest.pause()
    guest.resume()
    assert guest.digests() == digests
    with guest.forked() as fork:
        assert fork.digests() == digests


def test_a_damaged_disk_is_said_and_the_last_snapshots_is_taken(
    daemon: Daemon, guest: Sandbox
) -> None:
    """What was written since is gone from the guest, and kept beside."""
    guest.sh("echo saved >/data/said; sync")
    saved = guest.save("disk")
    guest.sh("echo after >/data/said; sync")
    killed(guest)
    [[name]] = daemon.record(guest.id).overlays
    overlay = daemon.home.sandbox(guest.id) / name
    with overlay.open("r+b") as file:
        file.write(b"damage" * 100)
    booted = guest.resume(cold=True)
    assert (booted.warm, booted.disk, booted.snapshot) == (False, "snapshot", saved.snapshot)
    [note] = booted.notes
    assert saved.snapshot in note
    assert name in note
    assert on_disk(guest) == "saved"
    assert overlay.with_name(f"{name}.damaged").exists()
    captures_are_exact(guest)


def test_a_disk_that_could_not_be_looked_at_is_not_damaged(daemon: Daemon, guest: Sandbox) -> None:
    """No descriptor or no process for the tool, once: the next attempt has what it wrote last."""
    guest.save("disk")
    guest.sh("echo after >/data/said; sync")
    killed(guest)
    before = daemon.record(guest.id)
    # The first and the second tool; where vfork is refused, fork is tried.
    faults = [("pipe2", "EMFILE", 1), ("pipe2", "EMFILE", 4), ("vfork,clone", "EAGAIN", 1)]
    for call, error, when in faults:
        with failing(daemon.pid, call, error, when), pytest.raises(StorageFailed) as failed:
            guest.resume(cold=True)
        assert "qemu-img could not be run" in failed.value.message
        after = daemon.record(guest.id)
        assert (after.state, after.overlays) == ("failed", before.overlays)
        assert (after.snapshot, after.error) == (before.snapshot, before.error)
        assert not list(daemon.home.sandbox(guest.id).glob("*.damaged"))
    booted = guest.resume(cold=True)
    assert (booted.disk, booted.notes) == ("own", [])
    assert on_disk(guest) == "after"


_ITS_ROW = Place("the row of a cold resume", "sandboxes", "json_extract(NEW.record, '$.cold')")


@pytest.mark.parametrize("place", [before_step("cold", "publish"), _ITS_ROW], ids=["greet", "row"])
def test_an_attempt_that_fails_on_a_snapshots_disk_changes_nothing(
    daemon: Daemon, guest: Sandbox, place: Place
) -> None:
    """The next one finds the same damage, says the same, and sets the overlay aside for good."""
    guest.sh("echo saved >/data/said; sync")
    saved = guest.save("disk")
    guest.sh("echo after >/data/said; sync")
    killed(guest)
    before = daemon.record(guest.id)
    [[name]] = before.overlays
    overlay = daemon.home.sandbox(guest.id) / name
    with overlay.open("r+b") as file:
        file.write(b"damage" * 100)
    bad, tap = overlay.read_bytes(), Tap(daemon.home)
    tap.fail(place)
    with pytest.raises(DiapauseError):
        guest.resume(cold=True)
    tap.clear()
    eventually("the failed attempt's end", lambda: guest.state == "failed", WAIT_S)
    after = daemon.record(guest.id)
    assert (after.overlays, after.snapshot) == (before.overlays, saved.snapshot)
    assert (after.error, after.reason) == (before.error, before.reason)
    assert overlay.read_bytes() == bad
    assert [path.name for path in overlay.parent.glob("disk*")] == [name]
    booted = guest.resume(cold=True)
    assert (booted.disk, booted.snapshot) == ("snapshot", saved.snapshot)
    [note] = booted.notes
    assert name in note
    assert on_disk(guest) == "saved"
    assert overlay.with_name(f"{name}.damaged").read_bytes() == bad


def test_an_overlay_that_names_a_file_of_the_host_is_none_of_ours(
    daemon: Daemon, guest: Sandbox, tmp_path: Path
) -> None:
    """Whoever took a VMM over may have written its head: no tool opens what it names."""
    saved = guest.save("disk")
    [size_bytes] = daemon.record(guest.id).disks_bytes
    killed(guest)
    [[name]] = daemon.record(guest.id).overlays
    overlay = daemon.home.sandbox(guest.id) / name
    overlay.unlink()
    options = f"data_file={tmp_path / 'secret'},data_file_raw=on"
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        str(overlay),
        str(size_bytes),
    ]
    subprocess.run(command, check=True, timeout=60)
    booted = guest.resume(cold=True)
    assert (booted.disk, booted.snapshot) == ("snapshot", saved.snapshot)
    [note] = booted.notes
    assert "features that no overlay of ours has" in note


def test_overlays_of_saves_that_failed_are_one_disk(daemon: Daemon, guest: Sandbox) -> None:
    """Each failed save leaves one behind; what was deleted stays deleted."""
    tap = Tap(daemon.home)
    guest.sh("echo first >/data/said; echo gone >/data/gone; sync")
    for text in ("second", "third"):
        tap.fail(before_step("save", "keep"))
        with pytest.raises(DiapauseError):
            guest.save()
        tap.clear()
        guest.sh(f"echo {text} >/data/said; rm -f /data/gone; sync")
    assert [len(names) for names in daemon.record(guest.id).overlays] == [3]
    killed(guest)
    assert guest.resume(cold=True).disk == "own"
    assert on_disk(guest) == "third"
    assert guest.exec("test", "-e", "/data/gone").returncode == 1
    assert [len(names) for names in daemon.record(guest.id).overlays] == [1]
    captures_are_exact(guest)


def test_without_a_snapshot_and_without_a_disk_there_is_nothing_to_boot(daemon: Daemon) -> None:
    """It says what is lost, and stays failed."""
    alone = daemon.run()
    killed(alone)
    [[name]] = daemon.record(alone.id).overlays
    (daemon.home.sandbox(alone.id) / name).unlink()
    with pytest.raises((BlobMissing, BlobDamaged)) as lost:
        alone.resume(cold=True)
    assert name in lost.value.message
    assert alone.state == "failed"
    alone.remove()


def test_only_what_ended_is_booted(guest: Sandbox) -> None:
    """A running one runs already; a paused one would lose its memory."""
    assert guest.resume(cold=True).already
    guest.pause()
    with pytest.raises(WrongState) as refused:
        guest.resume(cold=True)
    assert f"diapause resume {guest.id}" in refused.value.advice
    assert guest.resume().warm
