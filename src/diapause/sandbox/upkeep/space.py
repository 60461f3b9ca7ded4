"""df: what takes the space of a home, and what gc would free."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from diapause.model import DfAnswer, DfRow, DfSnapshot
from diapause.sandbox.upkeep import world
from diapause.sandbox.upkeep.collect import Found
from diapause.sandbox.upkeep.garbage import is_removed
from diapause.store.files import allocated_bytes, free_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import SnapshotRecord
    from diapause.sandbox.host import Host


def measure(host: Host) -> DfAnswer:
    """Allocated bytes by kind, and of each snapshot what it shares and what it has alone."""
    home, seen = host.home, world.look(host)
    found = Found(host, seen).answer(dry_run=True)
    free: Counter[str] = Counter()
    for item in found.items:
        free[item.kind] += item.bytes
    places: dict[str, Path] = {
        **{str(kind): place for kind, place in world.places(home).items()},
        "image": home.images, "sandbox": home.sandboxes,
        "buffer": home.buffers, "served": home.served, "unfinished": home.tmp,
    }  # fmt: skip
    inodes: set[int] = set()  # a frozen overlay is a link: it counts once
    rows = [_row(kind, place, free[kind], inodes) for kind, place in places.items()]
    catalog = sum(allocated_bytes(path) for path in home.root.glob("catalog*"))
    rows.append(DfRow(kind="catalog", count=1, bytes=catalog, gc_bytes=0))
    shown = [row for row in seen.snapshots if not is_removed(row)]
    users = Counter(build for row in seen.snapshots for build in _builds(row))
    return DfAnswer(
        rows=rows, total_bytes=sum(row.bytes for row in rows), gc_bytes=found.freed_bytes,
        free_bytes=free_bytes(home.root), snapshots=[_one(host, row, users) for row in shown],
    )  # fmt: skip


def _row(kind: str, place: Path, gc_bytes: int, inodes: set[int]) -> DfRow:
    found = list(place.iterdir()) if place.exists() else []
    size = sum(allocated_bytes(path, inodes) for path in found)
    return DfRow(kind=kind, count=len(found), bytes=size, gc_bytes=gc_bytes)


def _builds(record: SnapshotRecord) -> set[str]:
    return {build for device in record.devices for build in device.builds}


def _one(host: Host, record: SnapshotRecord, users: Counter[str]) -> DfSnapshot:
    own = allocated_bytes(host.home.snapshot(record.id)) + allocated_bytes(
        host.home.capture(record.id)
    )
    shared = 0
    for build in _builds(record):
        size = allocated_bytes(host.home.builds / build)
        if users[build] == 1:
            own += size
        else:
            shared += size
    return DfSnapshot(
        id=record.id, name=record.name, unique_bytes=own, shared_bytes=shared,
        flat_bytes=allocated_bytes(host.home.flat_of(record.id)),
    )  # fmt: skip
