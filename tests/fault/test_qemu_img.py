"""A tool that could not be run says nothing of the file that it was to look at."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.errors import BlobDamaged, DiapauseError, StorageFailed
from diapause.sandbox import cold
from diapause.sandbox.host import Host
from diapause.sandbox.recovery import settle
from diapause.snapshot.capture import CaptureFiles, check_structure, map_overlay
from diapause.store.home import Home
from tests.fault.test_repair import spoil
from tests.framework import captured_home as made


@pytest.fixture
def host(home: Home) -> Iterator[Host]:
    with made.host_of(home) as host:
        yield host


@pytest.fixture
def overlay(host: Host) -> Path:
    return CaptureFiles(host.home, made.capture(host).id).overlay("disk0", 0)


def asked_of(overlay: Path) -> list[type[DiapauseError]]:
    """What each of its uses comes to."""
    found: list[type[DiapauseError]] = []
    for ask in (
        lambda: check_structure(overlay, made.DISK_BYTES),
        lambda: map_overlay(overlay),
        lambda: cold._stand(overlay, None),
    ):
        try:
            ask()
        except DiapauseError as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOENT])
def test_no_process_is_no_damage(
    overlay: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", refused)
        assert asked_of(overlay) == [StorageFailed] * 3
    assert asked_of(overlay) == []


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("kill -9 $$", StorageFailed),
        ("kill -6 $$", StorageFailed),
        ("echo 'disk: Too many open files' >&2; exit 1", StorageFailed),
        ("exit 127", StorageFailed),
        ("echo 'bad tables' >&2; exit 1", BlobDamaged),
        ("exit 2", BlobDamaged),
    ],
)
def test_what_it_ended_with(
    overlay: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    error: type[DiapauseError],
) -> None:
    """A signal is no word of the overlay; an exit code is, unless something was refused to it."""
    tool = tmp_path / "qemu-img"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert asked_of(overlay) == [error] * 3


# -- a cold resume that was killed on a snapshot's disk --------------------------------------------


@pytest.mark.parametrize("last", ["disks", "files", "publish"])
def test_a_killed_attempt_leaves_its_own_damage_to_the_next(host: Host, last: str) -> None:
    """The row names what it named, and the damaged overlay lies where it lay."""
    older = made.packed(host)
    record = made.sandbox(host, "failed", older.id)
    overlay = host.home.sandbox(record.id) / "disk0-1.qcow2"
    spoil(overlay, 0)
    bad = overlay.read_bytes()
    verb = cold.Cold(host, record)
    verb._begin()
    verb.do_disks()
    assert verb.disk == "snapshot"
    if last != "disks":
        verb.do_files()
    if last == "publish":
        verb._set_own_aside()
        assert not overlay.exists()
    row = host.catalog.sandbox(record.id)
    assert row is not None
    assert row.overlays == [["disk0-1.qcow2"]]
    settle(host, row)
    after = host.catalog.sandbox(record.id)
    assert after is not None
    assert (after.state, after.snapshot, after.overlays) == (
        "failed", older.id, [["disk0-1.qcow2"]],
    )  # fmt: skip
    assert overlay.read_bytes() == bad
    assert [path.name for path in overlay.parent.glob("disk*")] == [overlay.name]
    again = cold.Cold(host, after)
    again._begin()
    again.do_disks()
    assert again.notes == verb.notes
