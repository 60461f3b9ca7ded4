"""check finds a bit that was turned over in any kind of file, and says whom it costs; --repair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import SnapshotLost
from diapause.model import CheckAnswer, CheckRequest, Damage, GcRequest
from tests.fault.test_damage import flipped
from tests.framework.fake_home import eventually
from tests.framework.guest_fixtures import copying_daemon
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox

pytestmark = pytest.mark.vm
daemon = copying_daemon  # flat files are what some of these tests are about


def check(daemon: Daemon, *, repair: bool = False) -> CheckAnswer:
    return daemon.client.check(CheckRequest(repair=repair))


def one(answer: CheckAnswer) -> Damage:
    [damage] = answer.damage
    return damage


@pytest.fixture
def paused(daemon: Daemon, guest: Sandbox) -> tuple[Sandbox, str, str]:
    """A paused guest with flat files, its snapshot, and its digests."""
    digests = guest.rewrite()
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    eventually("flat files", (daemon.home.flat_of(snapshot) / "flat.json").exists, WAIT_S)
    return guest, snapshot, digests


@contextlib.contextmanager
def writable(directory: Path) -> Iterator[None]:
    mode = directory.stat().st_mode
    directory.chmod(0o700)
    try:
        yield
    finally:
        directory.chmod(mode)


def test_a_turned_bit_in_any_kind_of_file(daemon: Daemon, paused: tuple[Sandbox, str, str]) -> None:
    """Each is named, with the snapshot and the sandbox that it costs, and nothing else is."""
    guest, snapshot, digests = paused
    first = check(daemon)
    assert first.damage == []
    home, place = daemon.home, daemon.home.snapshot(snapshot)
    detail = daemon.client.inspect_snapshot(snapshot)
    parents = {
        build
        for row in daemon.client.snapshots()
        if row.id != snapshot
        for device in row.devices
        for build in device.builds
    }
    own = [b for device in detail.devices for b in device.builds if b not in parents]
    blobs = [
        home.builds / own[0], place / "memory.header", place / "device-state",
        place / "manifest.json",
    ]  # fmt: skip
    for blob in blobs:
        with flipped(blob):
            found = one(check(daemon))
            assert found.blob == str(blob.relative_to(home.root))
            assert found.snapshots == [snapshot]
            assert found.sandboxes == [guest.id]
            [again] = daemon.client.verify_snapshot(snapshot).damage
            assert again.blob == found.blob
    flat = home.flat_of(snapshot) / "memory"
    sparse = next(at for at in range(0, flat.stat().st_size, 4096) if _has_data(flat, at))
    for blob, at in ((flat, sparse), (home.flat_of(snapshot) / "memory.sums", None)):
        with flipped(blob, at):
            assert one(check(daemon)).snapshots == []
    template = next(home.templates.glob("ext4-*"))
    with flipped(template / "disk0.header"):
        assert "disk0.header" in one(check(daemon)).blob
    away = blobs[0].with_name("away")
    blobs[0].rename(away)
    assert one(check(daemon)).missing
    away.rename(blobs[0])
    assert check(daemon).damage == []
    guest.resume()
    assert guest.digests() == digests


def _has_data(path: Path, at: int) -> bool:
    with path.open("rb") as file:
        file.seek(at)
        return any(file.read(4096))


def test_what_can_be_made_again_is(daemon: Daemon, paused: tuple[Sandbox, str, str]) -> None:
    guest, snapshot, digests = paused
    check(daemon)
    flat = daemon.home.flat_of(snapshot) / "disk0"
    flat.chmod(0o600)
    at = next(at for at in range(0, flat.stat().st_size, 4096) if _has_data(flat, at))
    with flat.open("r+b") as file:
        file.seek(at)
        file.write(b"?" * 100)
    manifest = daemon.home.snapshot(snapshot) / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text("{}")
    found = check(daemon, repair=True)
    how = {damage.repaired for damage in found.damage}
    assert how == {"made again", "written again from the catalog"}
    assert check(daemon).damage == []
    guest.resume()
    assert guest.digests() == digests


def test_what_is_lost_is_said_in_the_rows(daemon: Daemon, paused: tuple[Sandbox, str, str]) -> None:
    """The snapshot fails by the blob's name, and its sandbox says so; others are left alone."""
    guest, snapshot, _ = paused
    state = daemon.home.snapshot(snapshot) / "device-state"
    with flipped(state):
        damage = one(check(daemon, repair=True))
    assert damage.repaired is None
    found = daemon.client.inspect_snapshot(snapshot)
    assert found.state == "failed"
    assert found.error is not None
    assert "device-state" in found.error["message"]
    error = guest.inspect().error
    assert error is not None
    assert "device-state" in error["message"]
    with pytest.raises(SnapshotLost, match="device-state"):
        guest.resume()
    assert all(row.state != "failed" for row in daemon.client.snapshots() if row.id != snapshot)
    assert check(daemon).damage == []


def test_df_and_diff_agree_with_the_files(daemon: Daemon, guest: Sandbox) -> None:
    first = guest.save("disk").snapshot
    daemon.packed(first)
    guest.sh("head -c 400000 /dev/urandom >/tmp/new")
    second = guest.save("disk").snapshot
    daemon.packed(second)
    found = daemon.client.diff_snapshots(first, second)
    memory = next(device for device in found.devices if device.name == "memory")
    stored = next(d for d in daemon.client.inspect_snapshot(second).devices if d.name == "memory")
    assert memory.pages >= 100
    assert memory.bytes == memory.pages * 4096
    assert sum(length for _, length in memory.extents) <= memory.pages
    assert stored.stored_bytes >= 400_000
    same = daemon.client.diff_snapshots(first, first)
    assert [device.pages for device in same.devices] == [0, 0]
    space = daemon.client.df()
    by_kind = {row.kind: row for row in space.rows}
    assert by_kind["build"].bytes >= stored.stored_bytes
    assert next(row for row in space.snapshots if row.id == second).unique_bytes >= 400_000
    assert space.total_bytes == sum(row.bytes for row in space.rows)


def test_what_nobody_refers_to_is_listed_and_no_damage(daemon: Daemon, guest: Sandbox) -> None:
    """A file without a row, and a snapshot that was removed: gc frees them."""
    guest.rewrite()
    saved = guest.save("disk").snapshot
    daemon.packed(saved)
    daemon.packed(guest.save("disk").snapshot)
    daemon.client.remove_snapshot(saved)
    stray = daemon.home.builds / ("0" * 64)
    stray.write_bytes(b"of nobody")
    found = check(daemon)
    assert found.damage == []
    assert {saved, stray.name} <= {item.name for item in found.unreferenced}
    gone = {item.name for item in daemon.client.gc(GcRequest()).items}
    assert {saved, stray.name} <= gone
    assert not {saved, stray.name} & {item.name for item in check(daemon).unreferenced}


def test_what_is_packed_beside_a_check_is_no_damage(daemon: Daemon, guest: Sandbox) -> None:
    """A check that began with a capture ends with what became of it."""
    for _ in range(6):
        guest.rewrite()
        saved = guest.save("disk").snapshot
        assert check(daemon).damage == []
        daemon.packed(saved)
