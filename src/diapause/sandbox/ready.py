"""Ready snapshots: what the first `run` of an image keeps, so that later ones need not boot.

A ready snapshot is taken when the agent has answered and before the guest is told who it is. It is
a snapshot like any other, with a name that nobody can type: `ready:` and its key. The key is made
of all that it depends on; a run with another key does not find it. Nobody needs one: where it is
missing, damaged or can't be resumed, a run boots. So `gc` frees those that no sandbox stands on.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from diapause.catalog import now
from diapause.driver.qemu.command import LAYOUT, guest_visible
from diapause.model import ReadySnapshot
from diapause.sandbox.host import vmm_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.guest.images import Image
    from diapause.sandbox.host import Host

PREFIX = "ready:"


def is_ready(record: SnapshotRecord) -> bool:
    """Whether a snapshot is one of these, and nobody's own."""
    return record.name is not None and record.name.startswith(PREFIX)


def name_of(host: Host, image: Image, record: SandboxRecord) -> str:
    """The name under which a machine like this one is kept."""
    assert record.identity is not None
    identity, shape = vmm_identity(record.identity), host.shape(record)
    depends_on = [
        record.image, sorted((name, f.blake2b) for name, f in image.manifest.files.items()),
        image.manifest.command_line, image.manifest.agent_blake2b, asdict(shape),
        asdict(identity), LAYOUT, guest_visible(identity, shape), record.net,
    ]  # fmt: skip
    return PREFIX + blake2b(msgspec.json.encode(depends_on), digest_size=12).hexdigest()


def find(host: Host, name: str) -> SnapshotRecord | None:
    """The ready snapshot of this name, if it can be used."""
    found = host.catalog.snapshot_named(name)
    if found is not None and found.state == "failed":
        set_aside(host, found)  # the next run keeps another one
        return None
    return found


def list_ready(host: Host, image: str) -> list[ReadySnapshot]:
    """The ready snapshots of an image, oldest first."""
    return [
        ReadySnapshot(
            id=record.id, memory_bytes=record.memory_bytes, cpus=record.cpus,
            disks_bytes=record.disks_bytes, created_at=record.created_at,
            stored_bytes=record.state_bytes + sum(d.stored_bytes for d in record.devices),
        )
        for record in host.catalog.snapshots()
        if is_ready(record) and record.image == image
    ]  # fmt: skip


def set_aside(host: Host, record: SnapshotRecord) -> None:
    """No run finds it from here on; `gc` frees it when nobody stands on it."""

    def remove(found: SnapshotRecord) -> SnapshotRecord:
        return msgspec.structs.replace(found, name=None, removed_at=now())

    host.catalog.change_snapshot(record.id, remove, durable=False)


class Making:
    """Which ready snapshots are being made: of many first runs at once, one makes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the caller is the one."""
        with self._lock:
            mine = name not in self._names
            self._names.add(name)
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._names.discard(name)
