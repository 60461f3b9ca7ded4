"""Guests on demand whose snapshots lie in flat files already: they run on those, through the
pager's files."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.guest.images import Image
from diapause.model import CheckRequest, GcRequest, ResumeRequest
from tests.framework.fake_home import eventually
from tests.framework.sandbox import DISK_BYTES, MEMORY_BYTES, WAIT_S, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm

ONDEMAND = ResumeRequest(memory_mode="ondemand")


@pytest.fixture
def copying(tiny_image: Image) -> Iterator[Daemon]:
    """A home where memory is copied unless somebody says otherwise: flat files are made behind a
    pause."""
    with real_home(tiny_image, DIAPAUSE_MEMORY_MODE="copy") as made:
        yield made


def flat(daemon: Daemon, snapshot: str) -> Path:
    """A snapshot's flat files, once they are there."""
    place = daemon.home.flat_of(snapshot)
    eventually("its flat files", (place / "flat.json").exists, WAIT_S)
    daemon.packed(snapshot)
    return place


def passed(daemon: Daemon, guest: Sandbox) -> dict[str, bool]:
    served = daemon.client.inspect(guest.id).served
    assert served is not None
    return {file["name"].partition(".")[2]: file["passthrough"] for file in served["files"]}


def test_it_runs_on_its_flat_files_and_says_so(copying: Daemon) -> None:
    """Nothing is read through the pager, what is in memory is counted as the flat files'; it
    pauses and resumes again, also under another pager."""
    daemon, guest = copying, copying.run()
    guest.start_counter()
    digests, before = guest.rewrite(), guest.counted()
    place = flat(daemon, guest.pause("disk").snapshot)
    answer = daemon.client.resume(guest.id, ONDEMAND)
    assert (answer.warm, answer.memory_mode, answer.notes) == (True, "ondemand", [])
    assert sum((answer.faults or {}).values()) == 0
    assert passed(daemon, guest) == {"memory": True, "disk0": True}
    maps = Path(f"/proc/{guest.vmm_pid}/maps").read_text()
    assert f"/{place.name}.memory" in maps
    guest.counts_beyond(before)
    assert guest.digests() == digests
    served = daemon.client.inspect(guest.id).served
    assert served is not None
    assert all(file["seen"]["reads"] == {} for file in served["files"])
    assert 0 < served["resident_bytes"] < MEMORY_BYTES + DISK_BYTES
    assert served["resident_bytes"] + served["pending_bytes"] == MEMORY_BYTES + DISK_BYTES
    pid = daemon.client.doctor().pager_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    digests = guest.rewrite(64)
    place = flat(daemon, guest.pause("disk").snapshot)
    daemon.client.resume(guest.id, ONDEMAND)
    assert passed(daemon, guest) == {"memory": True, "disk0": True}
    assert guest.digests() == digests


def on_copy(daemon: Daemon, guest: Sandbox) -> str:
    """A snapshot on whose flat files its guest goes on, which were made for that."""
    snapshot = guest.pause("disk").snapshot
    daemon.packed(snapshot)
    assert guest.resume(memory_mode="copy").memory_mode == "copy"
    assert (daemon.home.flat_of(snapshot) / "flat.json").exists()
    return snapshot


def test_forks_stand_on_them_together_with_a_copy(daemon: Daemon, guest: Sandbox) -> None:
    """They share the page cache with who maps the flat file itself; a fork that is served already
    goes on so; each is right."""
    digests = guest.rewrite()
    paused = guest.pause("disk").snapshot
    with guest.forked(paused) as before:
        assert passed(daemon, before) == {"memory": False, "disk0": False}
        guest.resume(memory_mode="copy")
        with guest.forked(paused) as one, guest.forked(paused) as other:
            for fork in (one, other):
                assert passed(daemon, fork) == {"memory": True, "disk0": True}
                assert fork.digests() == digests
            assert passed(daemon, before) == {"memory": False, "disk0": False}
            assert before.digests() == digests
            first = one.pause("disk").snapshot  # also what was dirtied is found in it
            with one.forked(first) as child:
                assert child.digests() == digests
        assert before.save("disk").snapshot
    assert guest.digests() == digests


def test_a_flat_file_goes_only_when_nobody_runs_on_it(daemon: Daemon, guest: Sandbox) -> None:
    """Neither by gc nor by a repair; nothing is damaged, nothing is lost."""
    digests = guest.rewrite()
    snapshot = on_copy(daemon, guest)
    place = daemon.home.flat_of(snapshot)
    with guest.forked(snapshot) as fork:
        guest.pause("disk")
        assert passed(daemon, fork) == {"memory": True, "disk0": True}
        assert (snapshot, "flat") not in collected(daemon)
        assert place.exists()
        assert daemon.client.check(CheckRequest()).damage == []
        flip(place / "memory")
        before = (place / "memory").stat().st_ino
        [damage] = daemon.client.check(CheckRequest(repair=True)).damage
        assert (damage.blob, damage.repaired) == (f"flat/{snapshot}/memory", None)
        assert (place / "memory").stat().st_ino == before
        flip(place / "memory")
        assert fork.digests() == digests
    assert (snapshot, "flat") in collected(daemon)
    assert not place.exists()
    with guest.forked(snapshot) as fork:
        assert passed(daemon, fork) == {"memory": False, "disk0": False}
        assert fork.digests() == digests


def collected(daemon: Daemon) -> list[tuple[str, str]]:
    """What a collection took."""
    return [(item.name, item.kind) for item in daemon.client.gc(GcRequest()).items]


def flip(path: Path) -> None:
    """One bit of its last page, which no guest of these uses; or back."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    path.chmod(0o400)
