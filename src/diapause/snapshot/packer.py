"""Packing: a capture becomes builds, packed headers and a manifest; then its files go.

Invariants:
- Parents first: a packed header only names builds that are there.
- The order of a pack is builds, headers, manifest (renamed into place as one directory), row,
  removal of the capture. A kill anywhere leaves the capture and its row, and packing again is safe:
  builds are named by their digest.
- A pack that fails leaves the snapshot `captured`, resumable, with the cause in its row.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from diapause import _core
from diapause.errors import SnapshotNotFound
from diapause.snapshot.capture import CaptureFiles
from diapause.snapshot.headers import Headers
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.files import fsync_path, remove_tree, storage_errors, write_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diapause.catalog import Catalog, DeviceRecord, SnapshotRecord
    from diapause.snapshot.flats import FlatStore
    from diapause.snapshot.leases import Leases
    from diapause.store.gate import Gate
    from diapause.store.home import Home
    from diapause.store.templates import Templates


class Packer:
    """Packs captures of one home, one at a time: whoever calls it serialises."""

    def __init__(
        self,
        home: Home,
        catalog: Catalog,
        templates: Templates,
        leases: Leases,
        flats: FlatStore,
        gate: Gate,
    ) -> None:
        self._home, self._catalog, self._flats, self._gate = home, catalog, flats, gate
        self._templates, self._leases = templates, leases
        # Told before the capture goes, which is kept by a lease where it has to stay.
        self.on_packed: Callable[[SnapshotRecord], object] = lambda record: None

    def pack(self, snapshot_id: str) -> SnapshotRecord:
        """Pack a snapshot, and its ancestors before it; one that is packed stays as it is."""
        with self._gate.publishing():
            return self._pack_chain(snapshot_id)

    def _pack_chain(self, snapshot_id: str) -> SnapshotRecord:
        record = self._catalog.snapshot(snapshot_id)
        if record is None:  # it was removed while it waited for its turn
            raise SnapshotNotFound(reference=snapshot_id, candidates="others")
        if record.state != "captured":
            return record
        if record.parent is not None:
            self._pack_chain(record.parent)
        with storage_errors(f"snapshot {snapshot_id}", self._home.root):
            packed = self._pack(record)
        self.on_packed(packed)
        self._leases.retire(snapshot_id, lambda: self._remove_capture(snapshot_id))
        self._flats.packed(packed)
        return packed

    def _pack(self, record: SnapshotRecord) -> SnapshotRecord:
        fresh = self._home.tmp / f"snapshot-{record.id}-{os.urandom(4).hex()}"
        fresh.mkdir(mode=0o700)
        try:
            with Headers(self._home, self._catalog, self._templates, self._leases) as headers:
                devices = [self._device(headers, record, d, fresh) for d in record.devices]
            packed = msgspec.structs.replace(
                record,
                state="packed",
                durability=_at_least_disk(record),
                devices=devices,
                error=None,
            )
            state = self._flats.device_state(record).read_bytes()
            write_file(fresh / "device-state", state, sync=True)
            write_file(fresh / "manifest.json", manifest_bytes(packed), sync=True)
            self._publish(fresh, packed)
        finally:
            remove_tree(fresh)
        return packed

    def _publish(self, fresh: Path, packed: SnapshotRecord) -> None:
        fsync_path(fresh)
        place = self._home.snapshot(packed.id)
        remove_tree(place)  # of a pack that was killed before its row
        fresh.rename(place)
        fsync_path(place.parent)

        def publish(now: SnapshotRecord) -> SnapshotRecord:  # it may have been removed meanwhile
            return msgspec.structs.replace(packed, name=now.name, removed_at=now.removed_at)

        self._catalog.change_snapshot(packed.id, publish, durable=True)

    def _device(
        self, headers: Headers, record: SnapshotRecord, device: DeviceRecord, fresh: Path
    ) -> DeviceRecord:
        parent = headers.parent(record, device.name)
        header, digest, stored, changed = parent.path, parent.digest, 0, 0
        result = None
        layers = CaptureFiles(self._home, record.id).layers(record, device.name)
        for number, layer in enumerate(layers):
            final = number == len(layers) - 1
            out = fresh / (f"{device.name}.header" if final else f"{device.name}.{number}.partial")
            result = _core.pack(
                layer.source, str(header), digest, str(self._home.builds), str(self._home.tmp),
                str(out), self._parent_flat(record, device.name) if number == 0 else None,
            )  # fmt: skip
            header, digest = out, result.header_digest
            stored += result.stored_bytes
            changed += result.stored_pages + result.zero_pages
        for partial in fresh.glob(f"{device.name}.*.partial"):
            partial.unlink()
        assert result is not None
        return msgspec.structs.replace(
            device,
            header_digest=digest,
            header_bytes=result.header_bytes,
            changed_pages=changed,
            stored_bytes=stored + result.header_bytes,
            builds=[build for build, _ in result.builds],
        )

    def _parent_flat(self, record: SnapshotRecord, device: str) -> str | None:
        flat = self._flats.of_parent(record, device)
        return str(flat) if flat is not None else None

    def _remove_capture(self, snapshot_id: str) -> None:
        files = CaptureFiles(self._home, snapshot_id)
        remove_tree(files.directory)
        files.buffer.unlink(missing_ok=True)
        files.raw_state.unlink(missing_ok=True)


def _at_least_disk(record: SnapshotRecord) -> str:
    return "disk" if record.durability == "process" else record.durability
