"""check reads what is not packed: captures, disks of sandboxes, and flat files before their first
check. No guest is needed: the files are real ones, made by the code and tools that make them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.model import CheckAnswer, Damage
from diapause.sandbox.host import Host
from diapause.sandbox.upkeep import world
from diapause.sandbox.upkeep.check import check
from diapause.snapshot.capture import CaptureFiles
from diapause.store.home import Home
from tests.fault.test_damage import flipped
from tests.framework import captured_home as made


@pytest.fixture
def host(home: Home) -> Iterator[Host]:
    with made.host_of(home) as host:
        yield host


def one(answer: CheckAnswer) -> Damage:
    [damage] = answer.damage
    return damage


def how(answer: CheckAnswer, kind: str) -> set[str]:
    return {row.how for row in answer.kinds if row.kind == kind}


# -- flat files before their first check -----------------------------------------------------------


@pytest.mark.parametrize("digests", ["made behind", "never made"])
def test_damage_before_the_first_check_is_found(host: Host, digests: str) -> None:
    """Without digests, as after a kill, the file is compared with its builds; never believed."""
    record = made.packed(host)
    place = host.home.flat_of(record.id)
    if digests == "never made":
        for sums in place.glob("*.sums"):
            sums.unlink()
    with flipped(place / "memory", 5 * 4096 + 9):
        answer = check(host)
        assert one(answer).blob == f"flat/{record.id}/memory"
        assert answer.recorded == (2 if digests == "never made" else 0)
    assert check(host).damage == []
    assert how(answer, "flat file") == {"digest"}


def test_a_childs_digests_are_of_its_own_builds(host: Host) -> None:
    """Bad bytes that a clone took over from its parent's file are damage of both."""
    parent = made.packed(host)
    with flipped(host.home.flat_of(parent.id) / "memory", 5 * 4096 + 9):
        # As if it had not been seen: the file system says that nobody touched it.
        (host.home.flat_of(parent.id) / "flat.json").unlink()
        host.flats._remember(parent, host.home.flat_of(parent.id))
        child = host.packer.pack(made.capture(host, seed=100, parent=parent.id).id)
        host.flats.ensure(child)
        made.summed(host, child)
        found = {damage.blob for damage in check(host).damage}
    assert found == {f"flat/{row.id}/memory" for row in (parent, child)}


def test_without_its_builds_a_flat_file_stays_unchecked(host: Host) -> None:
    """And the report says so, besides the damage."""
    record = made.packed(host)
    (host.home.flat_of(record.id) / "memory.sums").unlink()
    [build] = next(device for device in record.devices if device.name == "memory").builds
    with flipped(host.home.builds / build):
        answer = check(host)
    assert one(answer).blob == f"builds/{build}"
    assert answer.unchecked == 1


def test_flat_files_of_an_unpacked_capture_get_digests_when_it_is_packed(host: Host) -> None:
    record = made.capture(host)
    host.flats.ensure(record)
    assert check(host).unchecked == 2
    made.summed(host, host.packer.pack(record.id))
    answer = check(host)
    assert (answer.damage, answer.unchecked, answer.recorded) == ([], 0, 0)


# -- captures --------------------------------------------------------------------------------------


def test_a_turned_bit_in_a_capture_costs_what_is_over_it(host: Host) -> None:
    first = made.capture(host)
    second = made.capture(host, seed=500, parent=first.id)
    assert check(host).damage == []
    memory = CaptureFiles(host.home, first.id).memory
    with flipped(memory, memory.stat().st_size - 1):
        damage = one(check(host))
    assert damage.blob == f"captures/{first.id}/memory"
    assert set(damage.snapshots) == {first.id, second.id}
    assert how(check(host), "capture") == {"digest"}


def test_a_buffer_has_a_list_and_no_sums(host: Host) -> None:
    record = made.capture(host, durability="process")
    answer = check(host)
    assert answer.damage == []
    assert how(answer, "capture buffer") == {"structure"}
    with flipped(CaptureFiles(host.home, record.id).buffer, 4096):
        assert one(check(host)).blob == f"captures/{record.id}/memory"


@pytest.mark.parametrize(
    ("at", "cause"), [(0, "no qcow2"), (15, "below it"), (31, "another size"), (48, "")]
)
def test_a_damaged_overlay_is_named(host: Host, at: int, cause: str) -> None:
    """By its head, which may name no other file, and its tables (48 is where one of them is)."""
    record = made.capture(host)
    overlay = CaptureFiles(host.home, record.id).overlay("disk0", 0)
    with flipped(overlay, at):
        damage = one(check(host))
    assert damage.blob == f"captures/{record.id}/disk0.0.qcow2"
    assert damage.snapshots == [record.id]
    assert cause in damage.cause
    answer = check(host)
    assert answer.damage == []
    assert how(answer, "overlay") == {"structure"}


def test_an_overlay_that_is_gone_or_cut_is_named(host: Host) -> None:
    record = made.capture(host)
    overlay = CaptureFiles(host.home, record.id).overlay("disk0", 0)
    whole = overlay.read_bytes()
    overlay.write_bytes(whole[: len(whole) // 2])
    assert one(check(host)).snapshots == [record.id]
    overlay.unlink()
    assert one(check(host)).missing


# -- disks of sandboxes ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
def test_a_sandboxs_own_disk_is_read(host: Host, state: str) -> None:
    """Of one at rest the tables are compared; those of a running one are in motion."""
    record = made.sandbox(host, state)
    overlay = host.home.sandbox(record.id) / "disk0-1.qcow2"
    answer = check(host)
    assert answer.damage == []
    kind, expected = ("overlay in use", "read") if state == "running" else ("overlay", "structure")
    assert how(answer, kind) == {expected}
    for at in (0,) if state == "running" else (0, 48):
        with flipped(overlay, at):
            damage = one(check(host))
            assert damage.sandboxes == [record.id]
            assert damage.snapshots == []
    overlay.rename(overlay.with_name("away"))
    assert one(check(host)).missing


def test_what_a_verb_took_meanwhile_is_no_damage(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made.sandbox(host, "stopped")
    (host.home.sandbox(record.id) / "disk0-1.qcow2").unlink()
    look = host.catalog.everything

    def before() -> object:
        rows = look()
        record.state, record.overlays = "resuming", [["disk0-2.qcow2"]]
        host.catalog.put_sandbox(record)
        return rows

    monkeypatch.setattr(host.catalog, "everything", before)
    assert check(host).damage == []


def test_an_overlay_that_was_being_folded_is_no_damage(host: Host) -> None:
    """A killed fold leaves a name in its head; what that names is not opened."""
    record = made.sandbox(host, "stopped")
    overlay = host.home.sandbox(record.id) / "disk0-1.qcow2"
    command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/nowhere/at/all"]
    subprocess.run([*command, str(overlay)], check=True, capture_output=True, timeout=60)
    assert check(host).damage == []


# -- templates -------------------------------------------------------------------------------------


def test_templates_are_read_with_their_builds(host: Host, tmp_path: Path) -> None:
    """An image's root disk too; and gc keeps what its header maps to."""
    disk = tmp_path / "disk"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", str(disk), "8M"], check=True, capture_output=True, timeout=60
    )
    root = host.templates.root_disk("d" * 64, 8 << 20, disk)
    host.templates.overlay(8 << 20, tmp_path / "overlay")
    answer = check(host)
    assert answer.damage == []
    assert answer.recorded == 0
    assert how(answer, "template") == {"digest", "structure"}
    builds = world.look(host).template_builds[root.header.parent.name]
    [build] = builds
    for blob, at in (
        (host.home.builds / build, 100), (root.flat, 1080), (root.header, None),
        (host.home.templates / f"overlay-{8 << 20}", 48),
    ):  # fmt: skip
        with flipped(blob, at):
            assert one(check(host)).blob == str(blob.relative_to(host.home.root))
    root.flat.with_name("disk0.sums").unlink()
    assert check(host).recorded == 1


# -- what can't be read ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["capture", "read", "flat"])
def test_a_disk_that_refuses_a_read_is_damage(host: Host, kind: str) -> None:
    """The kernel says EIO, as it does of a bad sector; strace says it here, for that file alone."""
    if kind == "flat":
        place = host.home.flat_of(made.packed(host).id)
        path, known = place / "memory", str(place / "memory.sums")
    else:
        files = CaptureFiles(host.home, made.capture(host).id)
        path, known = (files.memory if kind == "capture" else files.overlay("disk0", 0)), ""
    code = f"from diapause import _core; print(_core.check_blobs([{(kind, str(path), known)!r}]))"
    first = 2 if kind == "capture" else 1  # after its head
    inject = ["-P", str(path), "-e", f"inject=pread64:error=EIO:when={first}+"]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", *inject, sys.executable, "-c", code],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Input/output error" in done.stdout, done
