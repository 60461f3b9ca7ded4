"""One bad sandbox keeps no home from opening; what is lost is said, and nothing is built on it.

No guest is needed: these are decisions about rows and files.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from diapause.catalog import Identity, Process, SandboxRecord, SnapshotRecord
from diapause.daemon.start import trust_buffers
from diapause.driver.process import process_ref
from diapause.errors import CaptureFailed, DaemonUnreachable, StorageFailed
from diapause.model import CaptureRequest
from diapause.sandbox import recovery, sweep
from diapause.sandbox.host import Host
from diapause.sandbox.pause import Pause
from diapause.sandbox.upkeep.garbage import World, make_plan
from diapause.snapshot.capture import CaptureFiles
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.boot import boot_id
from diapause.store.files import remove_tree
from diapause.store.home import Home
from tests.framework.fake_home import eventually

BAD, GOOD = "1" * 16, "2" * 16
FIRST, SECOND = "a" * 16, "b" * 16
IDENTITY = Identity("qemu", "7.2.22", "pc-q35-7.2", "qemu64", "tcg")


@pytest.fixture
def host(home: Home) -> Iterator[Host]:
    """A home without guests."""
    loop = asyncio.new_event_loop()
    made = Host(home, loop)
    yield made
    made.close()
    loop.close()


def put(host: Host, sandbox: str, state: str, snapshot: str | None = None) -> SandboxRecord:
    """The row of a sandbox."""
    record = SandboxRecord(
        id=sandbox, name=None, state=state, created_at="2026-01-01T00:00:00.000Z", image="tiny",
        memory_bytes=1 << 27, cpus=1, disks_bytes=[], hostname="a", machine_id="c" * 32,
        identity=IDENTITY, snapshot=snapshot,
    )  # fmt: skip
    host.catalog.put_sandbox(record)
    return record


def put_snapshot(
    host: Host, snapshot: str, parent: str | None, state: str, boot: str | None = None
) -> None:
    """The row of a snapshot, of durability `process`, and its buffer."""
    (host.home.buffers / f"{snapshot}.memory").touch()
    record = SnapshotRecord(
        id=snapshot, name=None, sandbox=GOOD, parent=parent, state=state, durability="process",
        created_at=f"2026-01-01T00:00:00.{snapshot[:3]}Z", boot_id=boot or boot_id(), image="tiny",
        identity=IDENTITY, layout=1, memory_bytes=1 << 27, cpus=1, disks_bytes=[], hostname="a",
        machine_id="c" * 32, agent=True, dirty_source="private", dirty_pages=0, frozen_ms=1.0,
        state_bytes=0, state_digest="", devices=[], command_line=[],
    )  # fmt: skip
    host.catalog.put_snapshot(record, durable=True)


def found(host: Host, sandbox: str) -> SandboxRecord:
    """Its row as it is."""
    record = host.catalog.sandbox(sandbox)
    assert record is not None
    return record


def test_a_row_that_cannot_be_read_is_one_failed_sandbox(host: Host) -> None:
    """The others are settled, and it can be seen and removed."""
    put(host, BAD, "running")
    put(host, GOOD, "resuming")
    with closing(sqlite3.connect(host.home.catalog)) as db:
        db.execute("UPDATE sandboxes SET record = ? WHERE id = ?", (b'{"id": 7', BAD))
        db.commit()
    recovery.recover(host)
    bad = found(host, BAD)
    assert (bad.state, found(host, GOOD).state) == ("failed", "paused")
    assert bad.error is not None
    assert bad.error["code"] == "blob_damaged"
    assert BAD in bad.error["message"]
    assert [row.id for row in host.catalog.sandboxes()] == [BAD, GOOD]


def spoil(host: Host, snapshot: str) -> None:
    """Make the row of a snapshot one that can't be read."""
    with closing(sqlite3.connect(host.home.catalog)) as db:
        db.execute("UPDATE snapshots SET record = ? WHERE id = ?", (b"\xff{", snapshot))
        db.commit()


@pytest.mark.parametrize("state", ["packed", "captured"])
def test_the_row_of_a_snapshot_is_written_again_from_its_manifest(host: Host, state: str) -> None:
    """Nothing is lost: the sandbox that is paused at it stays paused."""
    put_snapshot(host, FIRST, None, state)
    put(host, GOOD, "paused", FIRST)
    row = host.catalog.snapshot(FIRST)
    assert row is not None
    captured = CaptureFiles(host.home, FIRST).manifest
    path = captured if state == "captured" else host.home.snapshot(FIRST) / "manifest.json"
    path.parent.mkdir()
    path.write_bytes(manifest_bytes(row))
    spoil(host, FIRST)
    recovery.recover(host)
    assert host.catalog.snapshot(FIRST) == row
    assert found(host, GOOD).state == "paused"
    assert "repaired" in [event.kind for event in host.catalog.journal.events()]


def test_a_snapshot_without_row_and_manifest_is_failed_and_its_files_stay(host: Host) -> None:
    """Nobody knows its builds, so gc takes none; the others are served."""
    put_snapshot(host, FIRST, None, "packed")
    put_snapshot(host, SECOND, FIRST, "packed")
    put(host, BAD, "paused", SECOND)
    put(host, GOOD, "paused", FIRST)
    spoil(host, SECOND)
    capture = CaptureFiles(host.home, SECOND).directory
    capture.mkdir()
    recovery.recover(host)
    row, bad = host.catalog.snapshot(SECOND), found(host, BAD)
    assert row is not None
    assert row.error is not None
    assert (row.state, row.error["code"]) == ("failed", "blob_damaged")
    assert SECOND in row.error["message"]
    assert (bad.state, found(host, GOOD).state) == ("failed", "paused")
    assert bad.error is not None
    assert FIRST in bad.error["message"]
    assert capture.exists()
    held = {"build": {"c" * 64}, "capture": {SECOND}, "snapshot": {SECOND}}
    sandboxes, snapshots = host.catalog.everything()
    plan = make_plan(World(sandboxes, snapshots, files=cast("Any", held)))
    assert plan.files == []


def test_an_error_that_nobody_expects_fails_one_sandbox(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row names the cause, and the last whole snapshot."""
    settle = recovery.settle

    def unreadable(host: Host, record: SandboxRecord) -> None:
        if record.id == BAD:
            raise LookupError("no way in")
        settle(host, record)

    put_snapshot(host, FIRST, None, "packed")
    put(host, BAD, "resuming", FIRST)
    put(host, GOOD, "resuming")
    monkeypatch.setattr(recovery, "settle", unreadable)
    recovery.recover(host)
    bad = found(host, BAD)
    assert (bad.state, found(host, GOOD).state) == ("failed", "paused")
    assert bad.error is not None
    assert "no way in" in bad.error["message"]
    assert FIRST in bad.error["message"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "too many"),
        sqlite3.OperationalError("disk I/O error"),
        StorageFailed(what="the catalog", cause="an I/O error"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_host_refuses_once_fails_no_sandbox(
    host: Host, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It says nothing of the sandbox: settled soon after, as if nothing had been."""
    settle, refused = recovery.settle, threading.Event()

    def once(host: Host, record: SandboxRecord) -> None:
        if not refused.is_set():
            refused.set()
            raise error
        settle(host, record)

    put_snapshot(host, FIRST, None, "packed")
    put(host, GOOD, "resuming", FIRST)
    monkeypatch.setattr(recovery, "settle", once)
    recovery.recover(host)
    assert refused.is_set()
    eventually("its settling", lambda: found(host, GOOD).state == "paused")


def test_what_can_not_be_removed_keeps_no_home_from_opening(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest goes, and the next daemon tries again."""
    places = [host.home.tmp / name for name in ("first", "second", "third")]
    for place in places:
        place.mkdir()
    kept = places[1]

    def refuse(path: Path) -> None:
        if path == kept:
            raise OSError(errno.EIO, "an I/O error")
        remove_tree(path)

    monkeypatch.setattr(sweep, "remove_tree", refuse)
    recovery.recover(host)
    assert [place for place in places if place.exists()] == [kept]
    monkeypatch.undo()
    recovery.recover(host)
    assert not kept.exists()


def test_a_verb_whose_settling_fails_stays_open_while_its_vmm_lives(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is settled by whoever asks next: a living guest is not given up for an internal error."""
    me = process_ref(os.getpid())
    assert me is not None
    record = put(host, GOOD, "running")
    record.process = Process(me.pid, me.start_ticks, me.boot_id)
    host.catalog.put_sandbox(record)
    host.catalog.journal.begin("d" * 16, "save", GOOD, FIRST, boot_id())

    def refuse(*_: object) -> None:
        raise LookupError("nobody expected this")

    later: list[str] = []
    monkeypatch.setattr(recovery, "settle", refuse)
    monkeypatch.setattr(host, "watch", lambda work: later.append(GOOD))
    recovery.recover(host)
    assert found(host, GOOD).state == "running"
    assert [row.id for row in host.catalog.journal.open_operations()] == ["d" * 16]
    assert later == [GOOD]


def test_what_was_captured_over_a_lost_capture_is_lost(host: Host) -> None:
    """Another boot took the first; the paused sandbox names the last whole one."""
    put_snapshot(host, "9" * 16, None, "packed")
    put_snapshot(host, FIRST, "9" * 16, "captured", "an earlier one")
    put_snapshot(host, SECOND, FIRST, "captured")
    put(host, GOOD, "paused", SECOND)
    recovery.recover(host)
    states = {row.id: row.state for row in host.catalog.snapshots()}
    assert states == {"9" * 16: "packed", FIRST: "failed", SECOND: "failed"}
    record = found(host, GOOD)
    assert record.state == "failed"
    assert record.error is not None
    assert record.error["code"] == "guest_lost"
    assert "9" * 16 in record.error["message"]
    assert FIRST in record.error["message"]


@pytest.mark.parametrize("lost", ["buffer", "row"])
def test_a_pause_over_what_is_lost_leaves_its_guest_running(host: Host, lost: str) -> None:
    """Its VMM is the last that has those pages: it must not be ended over nothing."""
    put_snapshot(host, FIRST, None, "failed" if lost == "row" else "captured")
    if lost == "buffer":
        (host.home.buffers / f"{FIRST}.memory").unlink()
    host.home.sandbox(GOOD).mkdir()
    record = put(host, GOOD, "running", FIRST)
    machine = SimpleNamespace(tracked=True, alive=lambda: False)
    guest = cast("Any", SimpleNamespace(machine=machine))
    with pytest.raises(CaptureFailed, match="what is lost"):
        Pause(host, record, guest, CaptureRequest(durability="process")).do_prepare()
    assert found(host, GOOD).state == "running"


@pytest.mark.parametrize("planted", ["link", "open", "file"])
def test_buffers_of_others_are_refused(home: Home, tmp_path: Path, planted: str) -> None:
    """The directory lies in a shared place, and guest memory goes there."""
    trust_buffers(home)
    home.buffers.rmdir()
    if planted == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        home.buffers.symlink_to(tmp_path / "theirs")
    elif planted == "open":
        home.buffers.mkdir()
        home.buffers.chmod(0o770)
    else:
        home.buffers.touch(mode=0o700)
    try:
        with pytest.raises(DaemonUnreachable, match="does not belong to this user alone"):
            trust_buffers(home)
    finally:
        home.buffers.rmdir() if planted == "open" else home.buffers.unlink()
