"""Rows as people and programs see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from diapause.errors import StorageFailed
from diapause.model import (
    CaptureAnswer,
    DeviceInfo,
    DirtySource,
    Durability,
    SandboxDetail,
    SandboxRow,
    SandboxState,
    SnapshotDetail,
    SnapshotState,
    Stalled,
    VmmInfo,
)
from diapause.sandbox.confinement import confinement_of
from diapause.snapshot.capture import CaptureFiles
from diapause.store.files import allocated_bytes
from diapause.units import pages

if TYPE_CHECKING:
    from diapause.catalog import Catalog, SandboxRecord, SnapshotRecord
    from diapause.sandbox.host import Host


def sandbox_rows(host: Host, records: list[SandboxRecord]) -> list[SandboxRow]:
    """The lines of `ps`."""
    served = any(record.pager is not None for record in records)
    stalled = host.ondemand.stalled() if served else {}
    return [_sandbox_row(record, stalled.get(record.id)) for record in records]


def _sandbox_row(record: SandboxRecord, stalled: Stalled | None) -> SandboxRow:
    return SandboxRow(
        sandbox=record.id, name=record.name, state=cast("SandboxState", record.state),
        image=record.image, memory_bytes=record.memory_bytes, cpus=record.cpus,
        disk_bytes=sum(record.disks_bytes), created_at=record.created_at,
        snapshot=record.snapshot, error=record.error, stalled=stalled,
    )  # fmt: skip


def sandbox_detail(host: Host, record: SandboxRecord) -> SandboxDetail:
    """`inspect` of a sandbox."""
    served, stalled = host.ondemand.seen(record), None
    if record.pager is not None:
        stalled = host.ondemand.stalled().get(record.id)
    vmm = None
    if record.process is not None and record.identity is not None:
        identity = record.identity
        vmm = VmmInfo(kind=identity.kind, version=identity.version, pid=record.process.pid)
    return SandboxDetail(
        id=record.id, name=record.name, state=cast("SandboxState", record.state),
        image=record.image, parent=record.snapshot, vmm=vmm, error=_error(host, record),
        reason=record.reason, memory_bytes=record.memory_bytes, cpus=record.cpus,
        disk_bytes=sum(record.disks_bytes), created_at=record.created_at,
        accelerator=record.identity.accelerator if record.identity else None,
        tracker=record.tracker, hostname=record.hostname, net=record.net, ports=record.ports,
        doing=_doing(host.catalog, record.id),
        directory=str(host.home.sandbox(record.id)), confinement=confinement_of(record),
        served=served, stalled=stalled,
    )  # fmt: skip


def _error(host: Host, record: SandboxRecord) -> dict[str, Any] | None:
    """The row's, or why the guest stands right now."""
    guest = host.guests.get(record.id)
    if guest is None or guest.stalled is None:
        return record.error
    return StorageFailed(what="the disk of a running guest", cause=guest.stalled).to_dict()


def _doing(catalog: Catalog, sandbox: str) -> str | None:
    """The verb that is under way on a sandbox and its present step."""
    for operation in catalog.journal.open_operations(sandbox):
        return f"{operation.verb}: {operation.steps[-1] if operation.steps else 'begin'}"
    return None


def snapshot_detail(host: Host, record: SnapshotRecord) -> SnapshotDetail:
    """`inspect` of a snapshot."""
    identity = record.identity
    return SnapshotDetail(
        id=record.id, name=record.name, sandbox=record.sandbox, parent=record.parent,
        state=cast("SnapshotState", record.state),
        durability=cast("Durability", record.durability),
        pending_bytes=_pending_bytes(host, record),
        devices=[
            DeviceInfo(
                name=device.name, size=device.size_bytes, pages=pages(device.size_bytes),
                stored_bytes=device.stored_bytes, builds=device.builds,
            )
            for device in record.devices
        ],
        error=record.error, created_at=record.created_at, image=record.image,
        memory_bytes=record.memory_bytes,
        stored_bytes=record.state_bytes + sum(d.stored_bytes for d in record.devices),
        vmm={
            "kind": identity.kind, "version": identity.version, "machine": identity.machine,
            "cpu": identity.cpu, "accelerator": identity.accelerator, "layout": record.layout,
        },
    )  # fmt: skip


def _pending_bytes(host: Host, record: SnapshotRecord) -> int:
    """What waits to be packed."""
    if record.state != "captured":
        return 0
    files = CaptureFiles(host.home, record.id)
    # Packing may end just now, and take them away.
    return allocated_bytes(files.buffer) + allocated_bytes(files.directory)


def paused_already(catalog: Catalog, record: SandboxRecord) -> CaptureAnswer:
    """The answer to a pause of a paused sandbox: what the pause before said."""
    snapshot = catalog.snapshot(record.snapshot or "")
    assert snapshot is not None
    return captured_before(record.id, snapshot)


def captured_before(sandbox: str, snapshot: SnapshotRecord) -> CaptureAnswer:
    """What a capture of earlier said, as far as its row keeps it."""
    return CaptureAnswer(
        sandbox=sandbox, snapshot=snapshot.id,
        durability=cast("Durability", snapshot.durability), frozen_ms=snapshot.frozen_ms,
        dirty_pages=snapshot.dirty_pages,
        dirty_source=cast("DirtySource", snapshot.dirty_source),
        captured_bytes=0, phases_ms={}, already=True,
    )  # fmt: skip


def changed_pages(catalog: Catalog, answer: CaptureAnswer) -> int:
    """What a capture by comparing really changed, known once it is packed."""
    snapshot = catalog.snapshot(answer.snapshot)
    memory = next((d for d in snapshot.devices if d.name == "memory"), None) if snapshot else None
    if memory is None or memory.changed_pages is None:
        return answer.dirty_pages
    return memory.changed_pages
