"""What was lost, and what is left: a failed row names its cause and the last whole snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from diapause.errors import GuestLost, SnapshotLost
from diapause.snapshot.capture import CaptureFiles
from diapause.snapshot.flats import blobs_of
from diapause.store.boot import boot_id

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import Catalog, SandboxRecord, SnapshotRecord
    from diapause.sandbox.host import Host


def last_whole(catalog: Catalog, snapshot: str | None) -> str | None:
    """The snapshot, or the nearest of its ancestors that is neither failed nor removed."""
    while snapshot is not None:
        record = catalog.snapshot(snapshot)
        if record is None:
            return None
        if record.state != "failed" and record.removed_at is msgspec.UNSET:
            return record.id
        snapshot = record.parent
    return None


def guest_lost(catalog: Catalog, record: SandboxRecord, cause: str) -> GuestLost:
    """The error of a sandbox that failed for this cause."""
    whole = last_whole(catalog, record.snapshot)
    if whole is None:
        since, advice = "it was made, as it has no whole snapshot,", "`diapause rm` removes it."
    else:
        since = f"snapshot {whole}, its last whole one,"
        advice = f"`diapause fork {whole}` starts from there."
    return GuestLost(sandbox=record.id, cause=cause, since=since, advice=advice, snapshot=whole)


def fail_lost_captures(host: Host) -> None:
    """A capture that was never synced is not served after the host went down, nor one whose
    buffer somebody removed, nor what was captured over either; oldest first."""
    failed = {row.id for row in host.catalog.snapshots(removed=True) if row.state == "failed"}
    for record in host.catalog.snapshots(removed=True):
        if record.state == "captured" and (cause := _lost(host, record, failed)):
            record.state = "failed"
            record.error = SnapshotLost(snapshot=record.id, cause=cause).to_dict()
            host.catalog.put_snapshot(record, durable=True)
            failed.add(record.id)


def fail_lost_sandboxes(host: Host) -> None:
    """A paused sandbox is its snapshot: where that is lost, so is what it did since the last."""
    for sandbox in host.catalog.sandboxes():
        found = host.catalog.snapshot(sandbox.snapshot) if sandbox.snapshot else None
        if sandbox.state == "paused" and found is not None and found.state == "failed":
            cause = (found.error or {}).get("fields", {}).get("cause", "unknown")
            sandbox.state = "failed"
            sandbox.error = guest_lost(host.catalog, sandbox, str(cause)).to_dict()
            host.catalog.put_sandbox(sandbox, durable=True)


def _lost(host: Host, record: SnapshotRecord, failed: set[str]) -> str | None:
    if record.durability == "process" and record.boot_id != boot_id():
        return "lost with the host"
    if record.durability == "process" and not CaptureFiles(host.home, record.id).buffer.exists():
        return "its capture buffer was removed"
    if record.parent in failed:
        return f"snapshot {record.parent}, which it was captured over, is lost"
    return None


def lost_below(host: Host, snapshot: str | None) -> str | None:
    """Why a capture over this snapshot could never be resumed; None where all is there."""
    while snapshot is not None:
        record = host.catalog.snapshot(snapshot)
        if record is None:
            return f"snapshot {snapshot} is gone"
        if record.state == "failed":
            cause = (record.error or {}).get("fields", {}).get("cause", "unknown")
            return f"snapshot {snapshot}, {cause}"
        needed = _needed(host, record)
        if missing := next((path for path in needed if not path.exists()), None):
            again = host.catalog.snapshot(snapshot)
            if again is not None and again.state != record.state:
                continue  # it was packed meanwhile
            return f"{missing.relative_to(missing.parents[1])} is missing"
        snapshot = record.parent if record.state == "captured" else None
    return None


def _needed(host: Host, record: SnapshotRecord) -> list[Path]:
    """The files that a snapshot is read from: a packed one stands alone."""
    if record.state != "captured":
        return blobs_of(host.home, record)
    files = CaptureFiles(host.home, record.id)
    memory = files.buffer if record.durability == "process" else files.memory
    return [memory, *(files.overlay(f"disk{i}", 0) for i in range(len(record.disks_bytes)))]
