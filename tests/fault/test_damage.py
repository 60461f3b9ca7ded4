"""A flipped bit in any blob: what needs it is refused with the blob's name; flipped back, it works.

With flat files that were made before the damage, and without.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import BlobDamaged, BlobMissing, DiapauseError
from tests.framework.catalog_tap import Place, Tap
from tests.framework.fake_home import eventually
from tests.framework.guest_fixtures import copying_daemon
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox

pytestmark = pytest.mark.vm
daemon = copying_daemon  # flat files are what some of these tests are about

PACKING = Place("packing", "snapshots", "NEW.state = 'packed'")


@contextlib.contextmanager
def flipped(path: Path, at: int | None = None) -> Iterator[None]:
    """One bit of the file is another while the block runs."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    place = path.stat().st_size // 2 if at is None else at
    _flip(path, place)
    try:
        yield
    finally:
        _flip(path, place)
        path.chmod(mode)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def blobs(daemon: Daemon, snapshot: str) -> list[Path]:
    """All that a packed snapshot is made of."""
    home, found = daemon.home, daemon.client.inspect_snapshot(snapshot)
    builds = {home.builds / build for device in found.devices for build in device.builds}
    place = home.snapshot(snapshot)
    names = ("memory.header", "disk0.header", "device-state", "manifest.json")
    assert builds
    return [*sorted(builds), *(place / name for name in names)]


def refused(daemon: Daemon, guest: Sandbox, snapshot: str, blob: Path) -> None:
    """Neither a resume nor a fork, each with the blob's name; no process, and nothing changed."""
    before = daemon.vmms()
    for call in (guest.resume, lambda: daemon.fork(snapshot)):
        with pytest.raises(BlobDamaged) as caught:
            call()
        assert blob.name in caught.value.message
    assert guest.state == "paused"
    assert daemon.vmms() == before


def refused_or_not_needed(
    daemon: Daemon, guest: Sandbox, snapshot: str, blob: Path, digests: str
) -> None:
    """Without flat files an ancestor's build is read where its pages are still in use."""
    parent = daemon.client.inspect_snapshot(snapshot).parent
    assert parent is not None
    if blob not in blobs(daemon, parent):
        refused(daemon, guest, snapshot, blob)
        return
    with contextlib.suppress(BlobDamaged), guest.forked(snapshot) as fork:
        assert fork.digests() == digests
        return
    with pytest.raises(BlobDamaged, match=blob.name):
        daemon.fork(snapshot)


def without_flat_files(daemon: Daemon, snapshot: str) -> None:
    """In one step: their digests are written behind, and by name."""
    place = daemon.home.flat_of(snapshot)
    if place.exists():
        away = place.rename(daemon.home.tmp / f"away-{secrets.token_hex(4)}")
        shutil.rmtree(away)


@pytest.fixture
def paused(daemon: Daemon, guest: Sandbox) -> tuple[Sandbox, str, str]:
    """A guest with a parent snapshot of its own, paused and packed; its snapshot and digests."""
    guest.rewrite()
    guest.save()
    digests = guest.rewrite(64)
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    flat = daemon.home.flat_of(snapshot) / "flat.json"
    eventually("the flat files", flat.exists, WAIT_S)
    return guest, snapshot, digests


@pytest.mark.parametrize("flat", [True, False], ids=["flat-files", "no-flat-files"])
def test_every_blob_is_verified(
    daemon: Daemon, paused: tuple[Sandbox, str, str], flat: bool
) -> None:
    """One blob after the other, damaged and mended."""
    guest, snapshot, digests = paused
    for blob in blobs(daemon, snapshot):
        with flipped(blob):
            if flat:
                refused(daemon, guest, snapshot, blob)
            else:
                without_flat_files(daemon, snapshot)
                refused_or_not_needed(daemon, guest, snapshot, blob, digests)
        with guest.forked(snapshot) as fork:
            assert fork.digests() == digests, blob
    assert guest.resume().warm
    assert guest.digests() == digests


@pytest.mark.parametrize("where", [0, 40, -1], ids=["first", "head", "last"])
def test_the_edges_of_a_blob_are_verified(
    daemon: Daemon, paused: tuple[Sandbox, str, str], where: int
) -> None:
    """Its first byte, one of its head, and its last."""
    guest, snapshot, digests = paused
    for blob in blobs(daemon, snapshot):
        without_flat_files(daemon, snapshot)
        with flipped(blob, where % blob.stat().st_size):
            refused_or_not_needed(daemon, guest, snapshot, blob, digests)


def test_a_missing_blob_is_named(daemon: Daemon, paused: tuple[Sandbox, str, str]) -> None:
    guest, snapshot, digests = paused
    for blob in blobs(daemon, snapshot):
        away = blob.with_name("away")
        blob.rename(away)
        with pytest.raises(BlobMissing) as caught:
            guest.resume()
        assert blob.name in caught.value.message
        away.rename(blob)
    guest.resume()
    assert guest.digests() == digests


def test_a_touched_flat_file_is_not_used(daemon: Daemon, paused: tuple[Sandbox, str, str]) -> None:
    """It is made again from what was verified."""
    guest, snapshot, digests = paused
    for device in ("memory", "disk0"):
        flat = daemon.home.flat_of(snapshot) / device
        before = flat.stat().st_ino
        flat.chmod(0o600)
        _flip(flat, flat.stat().st_size // 3)
        with guest.forked(snapshot) as fork:
            assert fork.digests() == digests
        assert flat.stat().st_ino != before


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_an_unpacked_capture_is_verified(daemon: Daemon, guest: Sandbox, durability: str) -> None:
    """A snapshot that is not packed yet: its pages and its device state."""
    digests = guest.rewrite()
    tap = Tap(daemon.home)
    tap.fail(PACKING)
    paused = guest.pause(durability)
    home = daemon.home
    pages = home.capture(paused.snapshot) / "memory"
    if durability == "process":
        pages = home.buffers / f"{paused.snapshot}.memory"
    for blob in (pages, home.capture(paused.snapshot) / "device-state"):
        with flipped(blob, 8192 + 17 if blob == pages else None):
            with pytest.raises(DiapauseError) as caught:
                guest.resume()
            assert caught.value.code == "blob_damaged"
            assert blob.name in caught.value.message
            assert guest.state == "paused"
    assert daemon.client.inspect_snapshot(paused.snapshot).state == "captured"
    assert guest.resume().source == "capture"
    assert guest.digests() == digests
    tap.clear()
