"""check --repair packs a build again from flat files that have its pages; what it can't is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diapause import _core
from diapause.catalog import SnapshotRecord
from diapause.errors import BlobDamaged, DiapauseError, StorageFailed
from diapause.model import CheckAnswer, CheckRequest, Damage
from diapause.sandbox.host import Host
from diapause.sandbox.upkeep import unpacked
from diapause.sandbox.upkeep.check import check
from diapause.sandbox.upkeep.repair import Repair
from diapause.snapshot.capture import check_structure
from diapause.store.home import Home
from tests.framework import captured_home as made
from tests.framework.catalog_tap import Tap
from tests.framework.sandbox import Daemon
from tests.framework.strace import failing, recorded


@pytest.fixture
def host(home: Home) -> Iterator[Host]:
    with made.host_of(home) as host:
        yield host


def repair(host: Host) -> CheckAnswer:
    verb = Repair(host)
    verb.execute()
    return verb.found


def one(answer: CheckAnswer) -> Damage:
    [damage] = answer.damage
    return damage


def build_of(host: Host, record: SnapshotRecord, device: str = "memory") -> Path:
    """The newest build of a snapshot's device."""
    return host.home.builds / next(d for d in record.devices if d.name == device).builds[-1]


def spoil(path: Path, at: int = 100) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"not what it was")
    path.chmod(mode)


def state(host: Host, snapshot: str) -> str:
    found = host.catalog.snapshot(snapshot)
    assert found is not None
    return found.state


@pytest.mark.parametrize("device", ["memory", "disk0"])
@pytest.mark.parametrize("damage", [spoil, Path.unlink], ids=["spoiled", "missing"])
def test_a_build_is_packed_again_from_a_flat_file(
    host: Host, device: str, damage: Callable[[Path], None]
) -> None:
    """As it was, byte by byte; the snapshot is as whole as before, and the report says how."""
    record = made.packed(host)
    build = build_of(host, record, device)
    before = build.read_bytes()
    damage(build)
    found = one(repair(host))
    assert found.blob == f"builds/{build.name}"
    assert found.repaired is not None
    assert f"flat/{record.id}/{device}" in found.repaired
    assert build.read_bytes() == before
    assert state(host, record.id) == "packed"
    assert check(host).damage == []
    assert not list(host.home.tmp.iterdir())
    assert "repaired" in [event.kind for event in host.catalog.journal.events()]


def test_a_template_has_the_pages_of_its_build(host: Host) -> None:
    """Without any flat file of a snapshot."""
    record = made.packed(host, flat=False)
    [template] = host.home.templates.glob("ext4-*")
    root = host.templates.disk(made.DISK_BYTES)
    [(build, _)] = _core.header_info(str(root.header), root.digest).builds
    spoil(host.home.builds / build)
    found = one(repair(host))
    assert found.repaired is not None
    assert f"templates/{template.name}/disk0" in found.repaired
    assert check(host).damage == []
    assert host.flats.ensure(record).made


def test_a_parents_build_comes_from_its_own_flat_file_or_a_childs(host: Host) -> None:
    """A child's has what it did not write over; here that is all of it."""
    parent = made.packed(host, flat=False)
    child = host.packer.pack(made.capture(host, seed=400, parent=parent.id).id)
    host.flats.ensure(child)
    spoil(build_of(host, parent))
    assert one(repair(host)).repaired is not None
    assert state(host, parent.id) == state(host, child.id) == "packed"
    host.flats.ensure(parent)
    assert check(host).damage == []


def test_a_flat_file_that_is_damaged_itself_is_not_believed(host: Host) -> None:
    """Where it is all there is, the build stays damaged, and its snapshots fail by its name."""
    record = made.packed(host)
    build = build_of(host, record)
    bad = build.read_bytes()
    spoil(build)
    spoil(host.home.flat_of(record.id) / "memory", 5 * 4096)
    found = {damage.blob: damage for damage in repair(host).damage}
    damage = found[f"builds/{build.name}"]
    assert damage.repaired is None
    assert "can't be made again" in damage.cause
    assert state(host, record.id) == "failed"
    assert build.read_bytes() != bad
    assert not list(host.home.tmp.iterdir())


def test_a_flat_file_that_is_damaged_elsewhere_is_enough(host: Host) -> None:
    """The build comes from what is whole of it, and then the file is made again from the build."""
    record = made.packed(host)
    build = build_of(host, record)
    spoil(build)
    spoil(host.home.flat_of(record.id) / "memory", made.MEMORY_BYTES - 4096)  # another chunk
    found = {damage.blob: damage.repaired for damage in repair(host).damage}
    assert found[f"flat/{record.id}/memory"] == "made again"
    assert found[f"builds/{build.name}"] is not None
    assert check(host).damage == []


def test_what_lies_nowhere_else_is_lost_by_name(host: Host) -> None:
    record = made.packed(host, flat=False)
    build = build_of(host, record)
    build.unlink()
    damage = one(repair(host))
    assert damage.repaired is None
    assert damage.missing
    assert damage.snapshots == [record.id]
    found = host.catalog.snapshot(record.id)
    assert found is not None
    assert found.error is not None
    assert build.name in found.error["message"]


@pytest.mark.parametrize("step", ["builds", "files", "rows"])
def test_a_repair_that_ends_at_any_step_is_done_again(host: Host, step: str) -> None:
    """What it has mended stays so, and nothing half is left under a name."""
    record = made.packed(host)
    spoil(build_of(host, record))
    spoil(host.home.flat_of(record.id) / "disk0", 1 << 20)
    verb = Repair(host)
    for name in verb.steps[: verb.steps.index(step)]:
        getattr(verb, f"do_{name}")()
    left = repair(host)
    assert all(damage.repaired for damage in left.damage)
    assert state(host, record.id) == "packed"
    assert check(host).damage == []


# -- what is said of a row is said for good --------------------------------------------------------


def reported_once(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, times: int = 1) -> None:
    """A reading of this file finds something that is not there, so many times."""
    read, left = _core.check_blobs, [kind] * times

    def reporting(jobs: list[tuple[str, str, str]], threads: int) -> list[tuple[int, str, str]]:
        found: list[tuple[int, str, str]] = [*read(jobs, threads)]
        for at, (_, path, _) in enumerate(jobs):
            if path.endswith(name) and left:
                found.append((at, "so it was said", left.pop()))
        return found

    monkeypatch.setattr(_core, "check_blobs", reporting)


@pytest.mark.parametrize("name", ["memory.header", "device-state", "memory", "disk0.0.qcow2"])
def test_what_is_whole_when_it_is_read_again_costs_nobody_a_snapshot(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One reading that failed is no reason for a row that nobody takes back."""
    packed = name == "memory.header"
    record = made.packed(host, flat=False) if packed else made.capture(host)
    reported_once(monkeypatch, f"{record.id}/{name}", "damaged")
    found = one(repair(host))
    assert found.cause == "so it was said"
    assert found.repaired is not None
    assert "read again" in found.repaired
    assert state(host, record.id) == record.state
    assert "repaired" not in [event.kind for event in host.catalog.journal.events()]


def test_an_overlay_is_compared_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of captures that are not packed; its tables are compared before anything else is read."""
    record, compare = made.capture(host), check_structure
    errors = [BlobDamaged(blob="disk0", cause="once")]

    def comparing(overlay: Path, size: int, *, folding: bool = False) -> None:
        if errors:
            raise errors.pop()
        compare(overlay, size, folding=folding)

    monkeypatch.setattr(unpacked, "check_structure", comparing)
    assert one(repair(host)).repaired is not None
    assert state(host, record.id) == "captured"


@pytest.mark.parametrize("name", ["memory.header", "device-state"])
def test_what_can_not_be_read_is_said_and_is_no_loss(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Descriptors that are wanting say nothing of the file, however often it is tried."""
    record = made.packed(host, flat=False)
    reported_once(monkeypatch, f"{record.id}/{name}", "unread", times=2)
    found = one(repair(host))
    assert (found.unread, found.repaired) == (True, None)
    assert state(host, record.id) == "packed"


def test_a_tool_that_could_not_be_run_is_no_loss(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made.capture(host)

    def unable(overlay: Path, *_: object, **__: object) -> None:
        raise StorageFailed(what=overlay.name, cause="qemu-img could not be run")

    monkeypatch.setattr(unpacked, "check_structure", unable)
    found = one(repair(host))
    assert (found.unread, found.repaired) == (True, None)
    assert found.cause == "it could not be read: qemu-img could not be run"
    assert state(host, record.id) == "captured"


@pytest.mark.parametrize("name", ["memory.header", "device-state"])
def test_what_is_damaged_both_times_is_lost(host: Host, name: str) -> None:
    record = made.packed(host, flat=False)
    spoil(host.home.snapshot(record.id) / name)
    assert one(repair(host)).repaired is None
    assert state(host, record.id) == "failed"


@pytest.mark.parametrize(
    "every", [24, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_an_open_that_fails_loses_no_snapshot(home: Home, every: int) -> None:
    """In the real daemon and its tools: the first opens, and one of so many of the others. strace
    counts them in each thread, so that the first of a thread that reads fails both times."""
    with made.host_of(home) as host:
        packed = made.packed(host)
        captured = made.capture(host, seed=400, parent=packed.id)
    kept = {packed.id: "packed", captured.id: "captured"}
    daemon, repairing = Daemon(home), CheckRequest(repair=True)
    unread, refused = set[str](), set[str]()
    with Tap(home).packing_fails():
        assert states(daemon) == kept
        with recorded(daemon.pid) as calls:
            assert daemon.client.check(repairing).damage == []
        opened = sum(call.name == "openat" and call.process == 0 for call in calls)
        for when in [*range(1, 10), *range(10, opened + 1, every)]:
            with failing(daemon.pid, "openat", "EMFILE", when):
                try:
                    found = daemon.client.check(repairing).damage
                    unread |= {damage.blob for damage in found if damage.unread}
                except DiapauseError as error:
                    refused.add(error.code)
            assert states(daemon) == kept, when
        daemon.stop()
    assert refused <= {StorageFailed.code}
    assert unread


def states(daemon: Daemon) -> dict[str, str]:
    return {row.id: row.state for row in daemon.client.snapshots()}
