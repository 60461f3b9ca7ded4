"""Which header says where a snapshot's pages lie, packed or not yet.

The packed header of a snapshot lies beside its manifest. Before that a provisional header maps what
was captured to the capture, over the header of the parent, which may be provisional itself. It is
made when it is needed and never kept: the capture that it speaks of goes away once packed.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diapause import _core
from diapause.errors import BlobDamaged, BlobMissing, SnapshotLost
from diapause.snapshot.capture import CaptureFiles, CapturePlace
from diapause.store.templates import DeviceRoot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diapause.catalog import Catalog, SnapshotRecord
    from diapause.snapshot.leases import Leases
    from diapause.store.home import Home
    from diapause.store.templates import Templates


@dataclass
class DeviceHeader:
    """A header in force, and the captures that it maps to besides builds."""

    path: Path
    digest: str
    captures: dict[str, _core.PageSource] = field(default_factory=dict)
    places: dict[str, CapturePlace] = field(default_factory=dict)


@contextmanager
def damage_by_place(catalog: Catalog) -> Iterator[None]:
    """A header that is damaged is known by its digest below: say where it lies."""
    try:
        yield
    except BlobDamaged as error:
        for record in catalog.snapshots(removed=True):
            for device in record.devices:
                if device.header_digest and device.header_digest == error.fields.get("blob"):
                    blob = f"snapshots/{record.id}/{device.name}.header"
                    raise BlobDamaged(blob=blob, cause=error.fields.get("cause")) from error
        raise


class Headers:
    """Finds headers; use as a context manager around all reading that they lead to."""

    def __init__(
        self, home: Home, catalog: Catalog, templates: Templates, leases: Leases,
        *, stands_back: bool = False,
    ) -> None:  # fmt: skip
        self._stands_back = stands_back  # for a collection
        self._home, self._catalog = home, catalog
        self._templates, self._leases = templates, leases
        self._scope = ExitStack()

    def __enter__(self) -> Headers:
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()

    def root(self, record: SnapshotRecord, device: str) -> DeviceRoot:
        """What the device was before anybody wrote it."""
        size = next(d.size_bytes for d in record.devices if d.name == device)
        if device == "disk0" and record.root_disk is not None:
            return self._templates.root_disk(record.root_disk, size)
        make = self._templates.memory if device == "memory" else self._templates.disk
        return make(size)

    def parent(self, record: SnapshotRecord, device: str) -> DeviceHeader:
        """The header that `record`'s own is made over."""
        if record.parent is None or (record.cold and device == "memory"):
            root = self.root(record, device)
            return DeviceHeader(root.header, root.digest)
        parent = self._catalog.snapshot(record.parent)
        if parent is None:
            raise BlobMissing(blob=f"snapshots/{record.parent}")
        return self.of(parent, device)

    def of(self, record: SnapshotRecord, device: str) -> DeviceHeader:
        """The header of a snapshot's device: packed, or provisional with its captures."""
        self._scope.enter_context(self._leases.hold(record.id, stands_back=self._stands_back))
        found = self._catalog.snapshot(record.id) or record  # again: now it can't be removed
        if found.state == "failed":
            raise SnapshotLost(snapshot=found.id, cause=(found.error or {}).get("message", "?"))
        if found.state == "captured":
            return self._provisional(found, device)
        entry = next(d for d in found.devices if d.name == device)
        path = self._home.snapshot(found.id) / f"{device}.header"
        if not path.exists():
            raise BlobMissing(blob=f"snapshots/{found.id}/{device}.header")
        return DeviceHeader(path, entry.header_digest)

    def _provisional(self, record: SnapshotRecord, device: str) -> DeviceHeader:
        header = self.parent(record, device)
        for layer in CaptureFiles(self._home, record.id).layers(record, device):
            name = f"{record.id}-{device}-{os.urandom(4).hex()}.header"
            out = self._home.tmp / name
            self._scope.callback(out.unlink, missing_ok=True)
            info = _core.provisional_header(
                str(header.path), header.digest, layer.source, layer.capture_id, str(out)
            )
            captures = {**header.captures, layer.capture_id: layer.source}
            places = {**header.places, layer.capture_id: layer.place}
            header = DeviceHeader(out, info.digest, captures, places)
        return header
