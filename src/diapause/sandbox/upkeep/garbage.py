"""What nothing refers to any more: the plan of `gc`, from the rows and the names of the files.

A plan reads no file and changes nothing, so it can be made over any made-up world.

Kept are: snapshots that nobody removed; a ready or removed one as long as a sandbox stands on it,
a capture that is not packed has it for a parent, or somebody reads it; their builds; templates that
guests were booted from and not captured since; flat files that a process maps or, where memory is
copied, a paused sandbox resumes from. Flat files and templates are made again when they are needed.

While a row of a snapshot can't be read nobody knows its builds: no build goes, nor its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec

from diapause.catalog import is_unreadable
from diapause.sandbox.ready import is_ready

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord, SnapshotRecord

Kind = Literal["snapshot", "build", "flat", "capture", "template"]


@dataclass(frozen=True)
class World:
    """A home at one instant: rows, what is under way, and the names of what lies there."""

    sandboxes: list[SandboxRecord]
    snapshots: list[SnapshotRecord]  # removed ones too
    reading: Set[str] = frozenset()  # snapshots that somebody reads
    capturing: Set[str] = frozenset()  # snapshots of verbs under way
    files: Mapping[Kind, Set[str]] = field(default_factory=dict)
    template_builds: Mapping[str, Set[str]] = field(default_factory=dict)
    copies: bool = True  # whether a resume maps flat files, unless somebody says otherwise


@dataclass(frozen=True)
class Plan:
    """What may go: rows of removed snapshots, and files by kind, each in the order of names."""

    rows: list[str]
    files: list[tuple[Kind, str]]


def is_removed(record: SnapshotRecord) -> bool:
    """Whether somebody removed it; its row and its files wait for gc."""
    return record.removed_at is not msgspec.UNSET


def stood_on(world: World) -> set[str]:
    """Every snapshot that may not go, removed or not."""
    rows = {record.id: record for record in world.snapshots}
    wanted = [r.id for r in world.snapshots if not is_removed(r) and not is_ready(r)]
    for sandbox in world.sandboxes:
        uses = (sandbox.snapshot, sandbox.root, sandbox.cold_base)
        wanted += [one for one in uses if one is not None]
    wanted += [*world.reading, *world.capturing]
    kept: set[str] = set()
    while wanted:
        one = wanted.pop()
        if one in kept or (record := rows.get(one)) is None:
            continue
        kept.add(one)
        if record.state == "captured" and record.parent is not None:
            wanted.append(record.parent)  # its provisional header is over the parent's
    return kept


def make_plan(world: World) -> Plan:
    """What nothing refers to."""
    kept_ids = stood_on(world)
    kept = [record for record in world.snapshots if record.id in kept_ids]
    unreadable = {record.id for record in kept if is_unreadable(record)}
    templates = _templates(world, kept)
    keep: dict[Kind, Set[str]] = {
        "snapshot": {record.id for record in kept if record.state != "captured"},
        "build": world.files.get("build", set()) if unreadable else _builds(world, kept, templates),
        "flat": _flats(world),
        "capture": {r.id for r in kept if r.state == "captured"}
        | unreadable
        | world.capturing
        | world.reading,
        "template": templates,
    }
    found = [
        (kind, name)
        for kind, names in world.files.items()
        for name in sorted(names)
        if name not in keep[kind]
    ]
    return Plan([r.id for r in world.snapshots if r.id not in kept_ids], found)


def _builds(world: World, kept: list[SnapshotRecord], templates: Set[str]) -> set[str]:
    found = {build for record in kept for device in record.devices for build in device.builds}
    for template in templates:
        found |= world.template_builds.get(template, frozenset())
    return found


def _flats(world: World) -> set[str]:
    """Of guests that run or are being started, and of those that wait to be resumed."""
    found = set(world.reading)
    for sandbox in world.sandboxes:
        if sandbox.root is not None:
            found.add(sandbox.root)
        waits = world.copies and sandbox.state in ("pausing", "paused", "resuming")
        if sandbox.snapshot is not None and waits:
            found.add(sandbox.snapshot)
    return found


def _templates(world: World, kept: list[SnapshotRecord]) -> set[str]:
    """An empty file system is never made twice the same: it stays as long as a guest that began
    with it has not been captured and packed."""
    rows = {record.id for record in kept}
    found: set[str] = set()
    for sandbox in world.sandboxes:
        found |= {f"overlay-{size}" for size in sandbox.disks_bytes}
        booted = sandbox.root is None and sandbox.process is not None
        if sandbox.snapshot is None or booted or sandbox.state == "creating":
            found |= _roots(sandbox)
    for record in kept:
        if record.state == "captured" and (record.parent is None or record.parent not in rows):
            found |= _roots(record)
    return found


def _roots(record: SandboxRecord | SnapshotRecord) -> set[str]:
    start = "ext4" if record.root_disk is None else f"root-{record.root_disk}"
    disks = {f"{start}-{size}" for size in record.disks_bytes}
    return disks | {f"memory-{record.memory_bytes}"}
