"""What is refused: by its name, before anything starts, and with nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from diapause import errors, migrations
from diapause.catalog import Catalog, SnapshotRecord
from diapause.limits import MEMORY_BYTES_MAX
from diapause.model import CaptureRequest, ForkRequest, RunRequest
from diapause.units import GIB, MIB
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Aside, Daemon, Sandbox

pytestmark = pytest.mark.vm


def what_is_there(daemon: Daemon) -> dict[str, Any]:
    """Everything that a verb which was refused must have left as it was."""
    home = daemon.home
    with contextlib.closing(sqlite3.connect(home.catalog)) as database:
        rows = {
            table: database.execute(f"SELECT count(*) FROM {table}").fetchone()
            for table in ("sandboxes", "snapshots", "operations")
        }
    places = (home.sandboxes, home.snapshots, home.captures, home.flat, home.tmp, home.buffers)
    files = {str(place): sorted(path.name for path in place.iterdir()) for place in places}
    return {"rows": rows, "files": files, "vmms": sorted(daemon.vmms())}


@contextlib.contextmanager
def refused(daemon: Daemon, kind: type[errors.DiapauseError]) -> Iterator[list[str]]:
    """The block is refused with this error and changes nothing; yields its message's place."""
    before = what_is_there(daemon)
    said: list[str] = []
    with pytest.raises(kind) as caught:
        yield said
    said.append(f"{caught.value.message} {caught.value.advice}")
    assert what_is_there(daemon) == before


def wait_settled(daemon: Daemon) -> None:
    """Packing goes on behind the verbs: wait, or it would look like a change."""
    home = daemon.home
    for snapshot in daemon.client.snapshots():
        daemon.packed(snapshot.id)
    being_written = (home.tmp, home.captures)
    eventually(
        "the end of the packing",
        lambda: not [path for place in being_written for path in place.iterdir()],
        WAIT_S,
    )


# -- ids and names ---------------------------------------------------------------------------------


def test_an_unknown_id_lists_the_candidates(daemon: Daemon, booted: Sandbox) -> None:
    for call in (
        lambda: daemon.client.inspect("nobody"),
        lambda: daemon.client.pause("nobody", CaptureRequest()),
        lambda: daemon.client.remove("nobody"),
        lambda: Sandbox(daemon, "nobody").exec("true"),
    ):
        with refused(daemon, errors.SandboxNotFound) as said:
            call()
        assert booted.id in said[0]


def test_an_unknown_snapshot_lists_the_candidates(daemon: Daemon, booted: Sandbox) -> None:
    saved = booted.save()
    wait_settled(daemon)
    with refused(daemon, errors.SnapshotNotFound) as said:
        daemon.fork("nothing")
    assert saved.snapshot in said[0]


def test_an_ambiguous_id_lists_the_candidates(daemon: Daemon, booted: Sandbox) -> None:
    """Enough forks that two ids begin with the same digit."""
    forks = booted.fork(2)
    wait_settled(daemon)
    try:
        twins = add_twin_rows(daemon, booted.id)
        with refused(daemon, errors.AmbiguousReference) as said:
            daemon.client.inspect(twins[0][:8])
        assert all(twin in said[0] for twin in twins)
    finally:
        for twin in twins:
            daemon.client.remove(twin, force=True)
        for fork in forks:
            fork.remove()


def add_twin_rows(daemon: Daemon, like: str) -> list[str]:
    """Two stopped sandboxes whose ids differ in their last digit only."""
    twins = ["abcdef0123456780", "abcdef0123456781"]
    with contextlib.closing(Catalog(daemon.home.catalog)) as catalog:
        record = catalog.sandbox(like)
        assert record is not None
        for twin in twins:
            made = msgspec.structs.replace(
                record, id=twin, name=None, state="stopped", process=None, overlays=[]
            )
            catalog.put_sandbox(made)
    return twins


def test_a_name_in_use(daemon: Daemon, booted: Sandbox) -> None:
    """Of a sandbox and of a snapshot."""
    named = daemon.run("taken")
    saved = named.save(name="kept")
    wait_settled(daemon)
    with refused(daemon, errors.NameInUse) as said:
        daemon.run("taken")
    assert named.id in said[0]
    with refused(daemon, errors.NameInUse) as said:
        booted.save(name="kept")
    assert saved.snapshot in said[0]
    with refused(daemon, errors.NameInUse):
        named.pause(name="kept")
    named.remove()


def test_a_name_is_given_once_however_many_ask_at_once(daemon: Daemon, booted: Sandbox) -> None:
    """Two saves under one name: one snapshot has it, the other save is refused."""
    first, second = booted.fork(2)
    calls = [Aside(partial(guest.save, name="race")) for guest in (first, second)]
    failures = [call.wait() for call in calls]
    found = [snapshot for snapshot in daemon.client.snapshots() if snapshot.name == "race"]
    assert len(found) == 1
    assert sorted(type(failure).__name__ for failure in failures) == ["NameInUse", "NoneType"]
    for guest in (first, second):
        assert guest.sh("echo up").strip() == "up"
        assert guest.save().dirty_source in ("tracked", "private")
        guest.remove()


def test_a_removed_one_is_removed_already(daemon: Daemon, booted: Sandbox) -> None:
    [fork] = booted.fork()
    fork.remove()
    wait_settled(daemon)
    before = what_is_there(daemon)
    answer = daemon.client.remove(fork.id)
    assert (answer.removed, answer.already) == ([], [fork.id])
    assert what_is_there(daemon) == before


def test_a_running_one_is_not_removed_without_force(daemon: Daemon, booted: Sandbox) -> None:
    with refused(daemon, errors.WrongState):
        daemon.client.remove(booted.id, force=False)
    assert booted.sh("echo up").strip() == "up"


# -- the host --------------------------------------------------------------------------------------


def test_a_missing_image(daemon: Daemon, booted: Sandbox) -> None:
    wait_settled(daemon)
    with refused(daemon, errors.ImageNotFound) as said:
        daemon.client.run(RunRequest(image="absent"))
    assert "tiny" in said[0]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (RunRequest(memory_bytes=900 * GIB), errors.NotEnoughMemory),
        (RunRequest(memory_bytes=MEMORY_BYTES_MAX + MIB), errors.InvalidRequest),
        (RunRequest(memory_bytes=128 * MIB + 1), errors.InvalidRequest),
        (RunRequest(memory_bytes=0), errors.InvalidRequest),
        (RunRequest(disk_bytes=-1), errors.InvalidRequest),
        (RunRequest(cpus=0), errors.InvalidRequest),
        (RunRequest(name="../x"), errors.InvalidRequest),
        (RunRequest(net="bridge"), errors.InvalidRequest),
        (RunRequest(vmm="firecracker"), errors.NotSupportedYet),
    ],
    ids=lambda value: getattr(value, "__name__", "request"),
)
def test_a_machine_that_cannot_be(
    daemon: Daemon, booted: Sandbox, request_: RunRequest, error: type[errors.DiapauseError]
) -> None:
    wait_settled(daemon)
    with refused(daemon, error):
        daemon.client.run(request_)


@pytest.mark.parametrize("count", [0, -1, 10_000])
def test_a_number_of_forks_that_cannot_be(daemon: Daemon, booted: Sandbox, count: int) -> None:
    wait_settled(daemon)
    with refused(daemon, errors.InvalidRequest):
        daemon.client.fork(ForkRequest(source=booted.id, count=count))


def path_with(place: Path, programs: dict[str, str]) -> str:
    """A PATH that has what the daemon needs, but QEMU only as given."""
    place.mkdir()
    for tool in ("qemu-img", "mke2fs", "env"):
        found = shutil.which(tool)
        assert found is not None
        (place / tool).symlink_to(found)
    for name, text in programs.items():
        program = place / name
        program.write_text(text)
        program.chmod(0o755)
    return str(place)


@pytest.mark.parametrize(
    ("version", "error"),
    [(None, errors.VmmMissing), ("6.1.0", errors.VmmTooOld)],
    ids=["missing", "old"],
)
def test_a_vmm_that_is_missing_or_too_old(
    daemon: Daemon,
    booted: Sandbox,
    tmp_path: Path,
    version: str | None,
    error: type[errors.DiapauseError],
) -> None:
    """Nothing is started; a guest that runs already is not in the way, and goes on."""
    wait_settled(daemon)
    paused = booted.fork()[0]
    paused.pause()
    wait_settled(daemon)
    old = f"#!/bin/sh\necho QEMU emulator version {version}\n"
    programs = {"qemu-system-x86_64": old} if version else {}
    path = path_with(tmp_path / "bin", programs)
    without = daemon.with_environment({"PATH": path})
    assert Sandbox(without, booted.id).sh("echo up").strip() == "up"
    for call in (
        lambda: without.client.run(RunRequest(memory_bytes=128 * MIB)),
        lambda: without.fork(paused.inspect().parent or ""),
        lambda: Sandbox(without, paused.id).resume(),
    ):
        with refused(without, error) as said:
            call()
        assert "apt-get install" in said[0]
    daemon.with_environment({})
    assert paused.resume().warm
    paused.remove()


# -- compatibility ---------------------------------------------------------------------------------

CHANGES: dict[str, tuple[str, Callable[[SnapshotRecord], SnapshotRecord]]] = {}


def _other(part: str, **fields: str) -> None:
    def change(record: SnapshotRecord) -> SnapshotRecord:
        identity = msgspec.structs.replace(record.identity, **fields)
        return msgspec.structs.replace(record, identity=identity)

    CHANGES[part] = (next(iter(fields.values())), change)


_other("VMM", kind="cloud-hypervisor")
_other("QEMU version", version="99.0.0")
_other("machine type", machine="pc-q35-99.9")
_other("accelerator", accelerator="hvf")
_other("CPU model", cpu="EPYC-v4")
CHANGES["machine layout"] = ("999", lambda record: msgspec.structs.replace(record, layout=999))


@pytest.mark.parametrize("part", CHANGES)
def test_what_this_host_cannot_resume_is_refused_by_name(
    daemon: Daemon, guest: Sandbox, part: str
) -> None:
    """A resume and a fork, before anything is spawned; the sandbox stays paused, and whole."""
    paused = guest.pause()
    wait_settled(daemon)
    needed, change = CHANGES[part]
    with contextlib.closing(Catalog(daemon.home.catalog)) as catalog:
        good = catalog.snapshot(paused.snapshot)
        assert good is not None
        catalog.put_snapshot(change(good), durable=True)
        for call in (guest.resume, lambda: daemon.fork(paused.snapshot)):
            wait_settled(daemon)
            with refused(daemon, errors.SnapshotIncompatible) as said:
                call()
            assert part in said[0]
            assert needed in said[0]
        catalog.put_snapshot(good, durable=True)
    assert guest.state == "paused"
    assert guest.resume().warm


def test_a_catalog_of_a_newer_version_is_left_alone(daemon: Daemon, booted: Sandbox) -> None:
    """The daemon refuses to begin, and the guests go on."""
    pid = booted.vmm_pid
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.home.catalog)) as database:
        database.execute("PRAGMA user_version = 999")
    with pytest.raises(errors.DiapauseError) as caught:
        daemon.client.images()
    assert "999" in caught.value.message
    os.kill(pid, 0)
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.home.catalog)) as database:
        database.execute(f"PRAGMA user_version = {migrations.VERSION}")
    assert booted.sh("echo up").strip() == "up"
