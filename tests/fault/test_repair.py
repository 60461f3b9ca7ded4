"""check --repair packs a build again from flat files that have its pages; what it can't is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diapause import _core
from diapause.catalog import SnapshotRecord
from diapause.model import CheckAnswer, Damage
from diapause.sandbox.host import Host
from diapause.sandbox.upkeep.check import check
from diapause.sandbox.upkeep.repair import Repair
from diapause.store.home import Home
from tests.framework import captured_home as made


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
