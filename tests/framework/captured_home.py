"""A home without guests that has a real capture: memory, a disk's overlay, a device state."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diapause import _core
from diapause.catalog import DeviceRecord, Identity, SandboxRecord, SnapshotRecord
from diapause.sandbox.host import Host
from diapause.snapshot.capture import CaptureFiles
from diapause.store.boot import boot_id
from diapause.units import MIB, pages
from tests.framework.blobs import page_of, write_buffer
from tests.framework.fake_home import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.store.home import Home

MEMORY_BYTES, DISK_BYTES = 8 * MIB, 8 * MIB
IDENTITY = Identity("qemu", "7.2.22", "pc-q35-7.2", "qemu64", "tcg")
_SAME = {
    "image": "tiny", "memory_bytes": MEMORY_BYTES, "cpus": 1, "disks_bytes": [DISK_BYTES],
    "hostname": "a", "machine_id": "c" * 32, "identity": IDENTITY,
    "created_at": "2026-01-01T00:00:00.000Z",
}  # fmt: skip


@contextmanager
def host_of(home: Home) -> Iterator[Host]:
    """What a daemon has, without its daemon."""
    loop = asyncio.new_event_loop()
    host = Host(home, loop)
    try:
        yield host
    finally:
        host.close()
        loop.close()


def capture(
    host: Host, seed: int = 0, parent: str | None = None, durability: str = "disk"
) -> SnapshotRecord:
    """A capture of 300 pages of memory and some writes to a disk, and its row."""
    id_ = secrets.token_hex(8)
    files = CaptureFiles(host.home, id_)
    files.directory.mkdir(mode=0o700)
    written = {page: page_of(1000 + seed + page) for page in range(seed, seed + 300)}
    write_buffer(files.buffer, pages(MEMORY_BYTES), written)
    if durability != "process":
        _core.write_out(str(files.buffer), str(files.memory))
        files.buffer.unlink()
    overlay = files.overlay("disk0", 0)
    host.templates.disk(DISK_BYTES)
    host.templates.overlay(DISK_BYTES, overlay)
    write_disk(overlay, f"write -P {seed % 200 + 7} 1M 256k")
    state = page_of(900 + seed)
    files.state.write_bytes(state)
    devices = [
        DeviceRecord(name=name, size_bytes=size, header_digest="", header_bytes=0, captured_pages=1)
        for name, size in (("memory", MEMORY_BYTES), ("disk0", DISK_BYTES))
    ]
    record = SnapshotRecord(
        id=id_, name=None, sandbox="a" * 16, parent=parent, state="captured",
        durability=durability, boot_id=boot_id(), layout=1, agent=True, dirty_source="private",
        dirty_pages=300, frozen_ms=1.0, state_bytes=len(state), devices=devices, command_line=[],
        state_digest=_core.blake3_bytes(state), **_SAME,  # type: ignore[arg-type]
    )  # fmt: skip
    host.catalog.put_snapshot(record, durable=True)
    return record


def write_disk(overlay: Path, command: str) -> None:
    """Write to an overlay as a guest would."""
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", command, str(overlay)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip


def packed(host: Host, *, flat: bool = True, **more: object) -> SnapshotRecord:
    """A packed snapshot, with flat files that have their digests."""
    record = host.packer.pack(capture(host, **more).id)  # type: ignore[arg-type]
    if flat:
        host.flats.ensure(record)
        summed(host, record)
    return record


def summed(host: Host, record: SnapshotRecord) -> None:
    """Wait for the digests of a snapshot's flat files."""
    place = host.home.flat_of(record.id)
    files = [place / f"{device.name}.sums" for device in record.devices]
    eventually("digests of flat files", lambda: all(file.exists() for file in files), 60)


def sandbox(host: Host, state: str, snapshot: str | None = None) -> SandboxRecord:
    """A sandbox with an overlay of its own."""
    record = SandboxRecord(
        id=secrets.token_hex(8), name=None, state=state, snapshot=snapshot,
        overlays=[["disk0-1.qcow2"]], **_SAME,  # type: ignore[arg-type]
    )  # fmt: skip
    place = host.home.sandbox(record.id)
    place.mkdir(mode=0o700)
    host.templates.overlay(DISK_BYTES, place / "disk0-1.qcow2")
    write_disk(place / "disk0-1.qcow2", "write -P 5 2M 128k")
    host.catalog.put_sandbox(record)
    return record
