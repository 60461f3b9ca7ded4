"""Captures that failed or were killed: what is left of them is never taken for more than it is.

No guest is needed: these are the decisions about marks, left-over buffers and rows.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from diapause import _core
from diapause.catalog import Identity, Process, SandboxRecord, SnapshotRecord
from diapause.driver.base import Frozen
from diapause.driver.process import process_ref
from diapause.driver.qemu import QemuDriver
from diapause.errors import (
    BlobDamaged,
    CaptureFailed,
    DiapauseError,
    HostExhausted,
    NotEnoughSpace,
    SnapshotLost,
    StorageFailed,
    VmmTimeout,
)
from diapause.guest.link import Link
from diapause.journal import OperationRecord
from diapause.model import CaptureRequest, ForkRequest
from diapause.sandbox import engine, recovery, starts
from diapause.sandbox.guests import Guest
from diapause.sandbox.host import Host
from diapause.sandbox.pause import Pause, Save
from diapause.sandbox.refer import host_name
from diapause.sandbox.remove import Remove
from diapause.sandbox.resume import Boot, Fork, Resume, check_snapshot
from diapause.snapshot import flats
from diapause.snapshot.capture import CaptureFiles
from diapause.store.boot import boot_id
from diapause.store.home import Home
from tests.framework.blobs import page_of, write_buffer
from tests.framework.fake_home import eventually

SANDBOX, SNAPSHOT = "a" * 16, "b" * 16
STANDING = SimpleNamespace(machine=SimpleNamespace(tracked=True, alive=lambda: False))
IDENTITY = Identity("qemu", "7.2.22", "pc-q35-7.2", "qemu64", "tcg")


@pytest.fixture
def host(home: Home) -> Iterator[Host]:
    """A home without guests."""
    loop = asyncio.new_event_loop()
    made = Host(home, loop)
    home.sandbox(SANDBOX).mkdir()
    yield made
    made.close()
    loop.close()


def sandbox() -> SandboxRecord:
    return SandboxRecord(
        id=SANDBOX, name=None, state="running", created_at="2026-01-01T00:00:00.000Z", image="tiny",
        memory_bytes=1 << 27, cpus=1, disks_bytes=[], hostname="a", machine_id="c" * 32,
        identity=IDENTITY, captures=1,
    )  # fmt: skip


def save(host: Host) -> Save:
    return Save(host, sandbox(), cast("Any", STANDING), CaptureRequest())


def recover_killed(host: Host, verb: str) -> None:
    operation = OperationRecord(
        id="d" * 16, verb=verb, sandbox=SANDBOX, snapshot=SNAPSHOT, boot_id="", steps=["freeze"]
    )
    recovery._drop_capture(host, sandbox(), cast("Any", None), operation)


def test_a_second_failure_that_spilled_does_not_hide_behind_the_first(host: Host) -> None:
    """The pages of the first are kept; those between the two are known to nobody."""
    verb = save(host)
    verb.mark.write_text(SNAPSHOT)
    verb.unmerged.write_bytes(b"what the first capture left")
    verb.frozen = Frozen(rearmed=True, spilled_pages=1)
    verb.undo("keep", StorageFailed(what="the capture", cause="a test"))
    assert save(host).rule == "compared"


def test_a_killed_pause_takes_away_its_own_mark_alone(host: Host) -> None:
    """A pause never re-arms; the save before it did."""
    verb = save(host)
    verb.mark.write_text("e" * 16)
    recover_killed(host, "pause")
    assert save(host).rule == "compared"
    verb.mark.write_text(SNAPSHOT)
    recover_killed(host, "pause")
    assert save(host).rule == "tracked"


def snapshot(durability: str, boot: str) -> SnapshotRecord:
    return SnapshotRecord(
        id=SNAPSHOT, name=None, sandbox=SANDBOX, parent=None, state="captured",
        durability=durability, created_at="2026-01-01T00:00:00.000Z", boot_id=boot, image="tiny",
        identity=IDENTITY, layout=1, memory_bytes=1 << 27, cpus=1, disks_bytes=[], hostname="a",
        machine_id="c" * 32, agent=True, dirty_source="private", dirty_pages=0, frozen_ms=1.0,
        state_bytes=0, state_digest="", devices=[], command_line=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("durability", "boot", "buffer", "lost"),
    [
        ("process", "an earlier one", True, "lost with the host"),
        ("process", None, True, None),
        ("process", None, False, "its capture buffer was removed"),
        ("disk", "an earlier one", False, None),
    ],
)
def test_a_capture_that_was_not_synced_is_lost_with_its_host(
    host: Host, durability: str, boot: str | None, buffer: bool, lost: str | None
) -> None:
    """Rows carry the boot id: nothing that the host's end may have torn is ever resumed."""
    if buffer:
        CaptureFiles(host.home, SNAPSHOT).buffer.write_bytes(b"pages")
    host.catalog.put_snapshot(snapshot(durability, boot or boot_id()), durable=False)
    recovery.recover(host)
    found = host.catalog.snapshot(SNAPSHOT)
    assert found is not None
    assert found.state == ("failed" if lost else "captured")
    if lost:
        with pytest.raises(SnapshotLost, match=lost):
            check_snapshot(host, found)


@pytest.mark.parametrize("packs", [True, False])
def test_what_is_durable_stands_on_what_is_durable(
    host: Host, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    """A pause to the disk first brings there what a fork's save left in memory, or fails."""

    def pack(snapshot_id: str) -> SnapshotRecord:
        packed = snapshot("disk", boot_id()) if packs else snapshot("process", boot_id())
        assert snapshot_id == packed.id
        packed.state = "packed" if packs else "captured"
        host.catalog.put_snapshot(packed, durable=True)
        return packed

    host.catalog.put_snapshot(snapshot("process", boot_id()), durable=False)
    monkeypatch.setattr(host.packer, "pack", pack)
    verb = save(host)
    verb.record.snapshot = SNAPSHOT
    # Before anything stops: the next thing that a capture does is to estimate.
    if packs:
        with pytest.raises(AttributeError, match="dirty_estimate"):
            verb.do_prepare()
    else:
        with pytest.raises(CaptureFailed, match="could not be brought to the disk"):
            verb.do_prepare()


def test_a_pause_that_fails_after_its_commit_is_left_to_recovery(host: Host) -> None:
    """Its VMM holds the disks of a snapshot that is there: it must never be let go on."""
    verb = Pause(host, sandbox(), cast("Any", STANDING), CaptureRequest())
    host.catalog.journal.begin(verb.operation, "pause", SANDBOX, SNAPSHOT, boot_id())
    verb.committed = True
    verb._fail("release", StorageFailed(what="the end of a VMM", cause="a test"))
    assert [operation.id for operation in host.catalog.journal.open_operations()] == [
        verb.operation
    ]


def test_what_a_guest_did_not_take_is_said(host: Host) -> None:
    """A clock that could not be set, entropy that was refused: the answer has it."""
    host.catalog.put_sandbox(sandbox())
    verb = Boot(host, sandbox())
    welcome = SimpleNamespace(failed=["clock: Operation not permitted"])
    verb.guest = cast("Any", SimpleNamespace(greet=lambda identity, bound_s: welcome))
    verb.do_greet()
    assert verb.notes == ["the guest did not take its clock: Operation not permitted"]


def test_a_guest_is_not_ended_for_the_end_of_the_one_before(host: Host) -> None:
    """Its VMM died while it was paused; it was resumed before anybody came to see to that."""
    killed: list[str] = []
    before, now = Guest(SANDBOX, host.loop), Guest(SANDBOX, host.loop)
    for guest, name in ((before, "before"), (now, "now")):
        kill = partial(killed.append, name)
        guest.machine = cast("Any", SimpleNamespace(kill=kill, close=lambda: None))
    host.catalog.put_sandbox(sandbox())
    host.guests[SANDBOX] = now
    host._settle(before, "the VMM has ended")
    found = host.catalog.sandbox(SANDBOX)
    assert (killed, found and found.state) == ([], "running")
    host._settle(now, "the VMM has ended")
    found = host.catalog.sandbox(SANDBOX)
    assert (killed, found and found.state) == (["now"], "failed")


def standing(host: Host) -> list[str]:
    """A guest under this daemon that stands; what is asked of its machine."""
    asked: list[str] = []
    guest = Guest(SANDBOX, host.loop)
    guest.machine = cast("Any", SimpleNamespace(
        alive=lambda: True, status=lambda: "paused", thaw=lambda: asked.append("thaw"),
        kill=lambda: asked.append("kill"), close=lambda: None, tracked=True,
    ))  # fmt: skip
    host.guests[SANDBOX] = guest
    return asked


def test_an_operation_that_stayed_open_takes_no_snapshot_with_it(host: Host) -> None:
    """Its end could not be journaled after its commit; a later save was committed since."""
    host.catalog.put_snapshot(snapshot("disk", boot_id()), durable=True)
    host.home.capture(SNAPSHOT).mkdir()
    host.catalog.journal.begin("d" * 16, "save", SANDBOX, SNAPSHOT, boot_id())
    record, asked = sandbox(), standing(host)
    record.snapshot = "f" * 16
    host.catalog.put_sandbox(record)
    recovery.settle(host, record)
    assert host.home.capture(SNAPSHOT).is_dir()
    assert host.catalog.journal.open_operations() == []
    assert asked == ["thaw"]


def test_a_pause_that_could_not_be_put_back_is_settled_with_the_guest_it_has(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its monitor takes one client, which is there already."""
    monkeypatch.setattr(host.driver, "adopt", lambda *_: pytest.fail("it has a client"))
    host.catalog.journal.begin("d" * 16, "pause", SANDBOX, SNAPSHOT, boot_id())
    record, asked = sandbox(), standing(host)
    guest, record.state = host.guests[SANDBOX], "pausing"
    host.catalog.put_sandbox(record)
    recovery.settle(host, record)
    found = host.catalog.sandbox(SANDBOX)
    assert (asked, found and found.state) == (["thaw"], "running")
    assert host.guests[SANDBOX] is guest


def test_a_switch_that_could_not_be_recorded_is_recorded_by_the_undo(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog had no room; the capture that goes makes some."""
    verb = save(host)
    verb.record.overlays, verb.next_overlays = [["disk0.1.qcow2"]], ["disk0.2.qcow2"]
    full = NotEnoughSpace(what="x", needed_bytes="more", directory="/", available_bytes=0)
    put = host.catalog.put_sandbox

    def refuse(*_: object, **__: object) -> None:
        raise full

    verb.frozen = Frozen(switched=True)
    monkeypatch.setattr(host.catalog, "put_sandbox", refuse)
    with pytest.raises(NotEnoughSpace):
        verb._switched(switched=True)
    monkeypatch.setattr(host.catalog, "put_sandbox", put)
    verb.undo("freeze", full)
    found = host.catalog.sandbox(SANDBOX)
    assert found is not None
    assert found.overlays == [["disk0.1.qcow2", "disk0.2.qcow2"]]


def test_a_list_of_forgotten_pages_that_is_lost_is_missed(host: Host) -> None:
    """It lies on a tmpfs; whoever clears that must not make a capture leave pages out."""
    verb = save(host)
    verb.mark.write_text(verb.snapshot or "")
    verb.files.buffer.touch()
    verb.frozen = Frozen(rearmed=True)
    verb.undo("keep", StorageFailed(what="the capture", cause="a test"))
    assert save(host).rule == "tracked"
    verb.unmerged.unlink()
    assert save(host).rule == "compared"


@pytest.fixture
def forked(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[Fork]:
    """Forks come to a row that is running, without a guest; those that did."""
    done: list[Fork] = []

    def execute(verb: Fork) -> None:
        verb.record.state = "running"
        host.catalog.put_sandbox(verb.record)
        done.append(verb)

    monkeypatch.setattr(Fork, "execute", execute)
    monkeypatch.setattr(starts, "check_snapshot", lambda *_: None)
    monkeypatch.setattr(QemuDriver, "find", lambda *_: None)
    host.catalog.put_snapshot(snapshot("disk", boot_id()), durable=True)
    return done


def fork(host: Host, count: int = 3) -> list[str]:
    return engine.Engine(host).fork(ForkRequest(source=SNAPSHOT, count=count)).sandboxes


def test_forks_are_all_there_or_none_whatever_failed(
    host: Host, forked: list[Fork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody thought of leaves no fork running either."""
    numbers, known = itertools.count(1), Fork.execute

    def execute(verb: Fork) -> None:
        if next(numbers) == 2:
            raise PermissionError("not expected")
        known(verb)

    monkeypatch.setattr(Fork, "execute", execute)
    with pytest.raises(PermissionError):
        fork(host)
    assert host.catalog.sandboxes() == []


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_forks_without_a_thread_for_each_are_all_there_or_none(
    host: Host, forked: list[Fork], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """The pool keeps the work that a thread could not be started for, and another may do it."""
    numbers, start, execute = itertools.count(), threading.Thread.start, Fork.execute
    refused = threading.Event()

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("diapause-fork") and next(numbers) >= threads:
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    def slow(verb: Fork) -> None:
        assert refused.wait(60.0)  # none is done before: each is a thread of its own
        execute(verb)

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(Fork, "execute", slow)
    with pytest.raises(HostExhausted) as failed:
        fork(host)
    assert failed.value.code != DiapauseError.code
    assert host.catalog.sandboxes() == []
    assert len(forked) >= threads


def test_a_fork_that_can_not_be_undone_now_is_undone_later(
    host: Host, forked: list[Fork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps no other, and is removed when it can be; with the reserve, as `rm` is."""
    removed, execute, known = Counter[str](), Fork.execute, Remove.execute
    numbers = itertools.count(1)

    def second_fails(verb: Fork) -> None:
        execute(verb)
        if next(numbers) == 3:
            raise StorageFailed(what="a fork", cause="a test")

    def fails_first(verb: Remove) -> None:
        assert host.reserve._users
        removed[verb.sandbox] += 1
        if removed.total() == 1:
            raise StorageFailed(what="a removal", cause="a test")
        known(verb)

    monkeypatch.setattr(Fork, "execute", second_fails)
    monkeypatch.setattr(Remove, "execute", fails_first)
    with pytest.raises(StorageFailed, match="a fork"):
        fork(host)
    eventually("the removal of all", lambda: not host.catalog.sandboxes())
    assert sorted(removed.values()) == [1, 1, 2]


def test_what_no_thread_is_there_to_watch_for_is_done_by_the_next(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it, so whoever asked goes on."""
    done: list[int] = []

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        host.watch(lambda: done.append(1))
    host.watch(lambda: done.append(2))
    eventually("both", lambda: sorted(done) == [1, 2])


def test_a_damaged_blob_of_a_parent_is_not_its_childs(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent's flat file is only a shorter way; each snapshot restores alone."""

    def damaged(record: SnapshotRecord) -> None:
        raise BlobDamaged(blob=f"snapshots/{record.id}/memory.header", cause="a test")

    host.catalog.put_snapshot(snapshot("disk", boot_id()), durable=True)
    child = snapshot("disk", boot_id())
    child.id, child.parent = "e" * 16, SNAPSHOT
    monkeypatch.setattr(host.flats, "_usable", damaged)
    assert host.flats.of_parent(child, "memory") is None


def test_flat_files_have_their_record_or_are_not_there(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the record; later, a crash of the host that tore it: they are made again."""
    full = NotEnoughSpace(what="x", needed_bytes="more", directory="/", available_bytes=0)

    def refuse(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise full

    record, place = snapshot("process", boot_id()), host.home.flat_of(SNAPSHOT)
    host.catalog.put_snapshot(record, durable=True)
    with monkeypatch.context() as patch:
        patch.setattr(flats, "write_file", refuse)
        with pytest.raises(NotEnoughSpace):
            host.flats.ensure(record)
    assert not place.exists()
    assert list(host.home.tmp.iterdir()) == []
    assert host.flats.ensure(record).made
    assert not host.flats.ensure(record).made
    known = place / "flat.json"
    known.unlink()
    known.touch()
    assert host.flats.ensure(record).made


def test_a_resume_that_cannot_begin_leaves_the_sessions_waiting(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was journaled, so nothing is undone; the next resume goes on with the same link."""
    full = NotEnoughSpace(what="x", needed_bytes="more", directory="/", available_bytes=0)

    def refuse(*_: object) -> None:
        raise full

    link = host.parked[SANDBOX] = Link(SANDBOX)
    monkeypatch.setattr(host.catalog.journal, "begin", refuse)
    with pytest.raises(NotEnoughSpace):
        Resume(host, sandbox(), snapshot("disk", boot_id())).execute()
    assert Resume(host, sandbox(), snapshot("disk", boot_id())).guest.link is link


@pytest.mark.parametrize(("durability", "page"), [("process", 1), ("disk", 2)])
def test_a_durable_capture_is_read_from_its_file(host: Host, durability: str, page: int) -> None:
    """A buffer on a disk may come back from a crash of the host, sealed and without its pages."""
    files = CaptureFiles(host.home, SNAPSHOT)
    files.directory.mkdir()
    write_buffer(files.buffer, 8, {1: page_of(1)})
    written = host.home.buffers / "written"
    write_buffer(written, 8, {2: page_of(2)})
    _core.write_out(str(written), str(files.memory))
    [layer] = files.layers(snapshot(durability, boot_id()), "memory")
    assert layer.source.runs() == [(page, 1)]


def test_a_vmm_that_does_not_answer_a_new_daemon_is_settled_when_it_does(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guest may stand, but it lives: it is no failed sandbox, and its operation stays open."""
    me = process_ref(os.getpid())
    assert me is not None
    record, asked = sandbox(), standing(host)
    machine = host.guests.pop(SANDBOX).machine
    record.process, record.agent = Process(me.pid, me.start_ticks, me.boot_id), False
    host.catalog.put_sandbox(record)
    host.catalog.journal.begin("d" * 16, "pause", SANDBOX, SNAPSHOT, boot_id())
    silence = VmmTimeout(sandbox=SANDBOX, step="query-status", bound_s=20)

    def refuse(*_: object) -> None:
        raise silence

    with monkeypatch.context() as patch:
        patch.setattr(host, "watch", lambda work: None)
        patch.setattr(host.driver, "adopt", refuse)
        recovery.recover(host)
    found = host.catalog.sandbox(SANDBOX)
    assert (found and found.state, len(host.catalog.journal.open_operations())) == ("running", 1)
    answers: Iterator[Any] = iter([refuse, lambda *_: machine])
    monkeypatch.setattr(recovery, "_BETWEEN_S", 0.0)
    monkeypatch.setattr(host.driver, "adopt", lambda *_: next(answers)())
    recovery.settle_when_it_answers(host, SANDBOX)
    assert asked == ["thaw"]
    assert SANDBOX in host.guests
    assert host.catalog.journal.open_operations() == []


def test_a_tmpfs_that_was_cleared_fails_no_later_capture(host: Host) -> None:
    """As happens to a user's when its last session ends."""
    verb = save(host)
    verb.machine = cast("Any", SimpleNamespace(dirty_estimate=lambda rule: 0))
    verb.request.durability = "process"
    host.home.buffers.rmdir()
    verb.do_prepare()
    assert verb.files.buffer.exists()
    verb.buffer = None


def test_a_host_name_has_no_characters_that_it_may_not_have() -> None:
    """Every name that a sandbox may have makes one that the agent takes."""
    assert host_name("my_box.1") == "my-box.1"
