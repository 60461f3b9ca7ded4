"""What a capture took, as files, until it is packed.

    captures/ID/capture.json       the snapshot's record
                device-state       loadable
                memory             capture file; or, until it is written out, only what spilled
                disk0.N.qcow2      a frozen overlay, a hard link; N counts from the oldest
    BUFFERS/ID.memory              the capture buffer, gone once `memory` is whole

A device may have several layers: a save that failed after it had switched the overlays leaves one
behind for the next capture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diapause import _core
from diapause.errors import BlobMissing
from diapause.snapshot.qemu_img import MEMORY_BYTES, qemu_img
from diapause.units import pages

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import SnapshotRecord
    from diapause.store.home import Home


_LEAKS = 3  # of `qemu-img check`


@dataclass(frozen=True)
class Layer:
    """One capture of one device: its id in provisional headers and where its pages lie."""

    capture_id: str
    source: _core.PageSource
    place: CapturePlace


@dataclass(frozen=True)
class CapturePlace:
    """The files that a capture's pages lie in, for whoever opens them again."""

    path: Path
    spill: Path | None = None
    map: bytes = b""  # of an overlay: what it holds and where


class CaptureFiles:
    """The files of one capture."""

    def __init__(self, home: Home, snapshot: str) -> None:
        self.snapshot = snapshot
        self.directory = home.capture(snapshot)
        self.buffer = home.buffers / f"{snapshot}.memory"
        self.raw_state = home.buffers / f"{snapshot}.state"
        self.memory = self.directory / "memory"
        self.state = self.directory / "device-state"
        self.manifest = self.directory / "capture.json"

    def overlay(self, device: str, layer: int) -> Path:
        """A frozen overlay of a disk."""
        return self.directory / f"{device}.{layer}.qcow2"

    def layers(self, record: SnapshotRecord, device: str) -> list[Layer]:
        """The device's captures, oldest first."""
        if device == "memory":
            return [Layer(self._id(device, 0), *self._memory(record.durability))]
        size = next(d.size_bytes for d in record.devices if d.name == device)
        found: list[Layer] = []
        while (overlay := self.overlay(device, len(found))).exists():
            layer = Layer(self._id(device, len(found)), *self._disk(overlay, size))
            found.append(layer)
        if not found:
            raise BlobMissing(blob=f"captures/{self.snapshot}/{device}.0.qcow2")
        return found

    def _id(self, device: str, layer: int) -> str:
        return _core.blake3_bytes(f"{self.snapshot}/{device}/{layer}".encode())

    def _memory(self, durability: str) -> tuple[_core.PageSource, CapturePlace]:
        """A buffer is not synced: a durable capture is its file, whatever a crash left beside."""
        if durability == "process" and self.buffer.exists():
            spill = self.memory if self.memory.exists() else None
            source = _core.PageSource.capture(str(self.buffer), str(spill) if spill else None)
            return source, CapturePlace(self.buffer, spill)
        if not self.memory.exists():
            raise BlobMissing(blob=f"captures/{self.snapshot}/memory")
        return _core.PageSource.capture(str(self.memory)), CapturePlace(self.memory)

    def _disk(self, overlay: Path, size_bytes: int) -> tuple[_core.PageSource, CapturePlace]:
        _core.check_overlay(str(overlay), size_bytes)
        map_ = map_overlay(overlay)
        source = _core.PageSource.overlay(str(overlay), map_, pages(size_bytes))
        return source, CapturePlace(overlay, map=map_)


def open_overlay(overlay: Path, size_bytes: int) -> _core.PageSource:
    """The pages of an overlay of a disk of this size; its guest may be running.

    Its VMM wrote it: its head is looked at before a tool opens what that names.
    """
    _core.check_overlay(str(overlay), size_bytes)
    return _core.PageSource.overlay(str(overlay), map_overlay(overlay), pages(size_bytes))


def map_overlay(overlay: Path) -> bytes:
    """Which ranges an overlay holds, and at which offset of its file."""
    map_ = ("map", "-U", "--output=json", "-f", "qcow2", str(overlay))
    return qemu_img(overlay, *map_, memory_bytes=MEMORY_BYTES)


def check_structure(overlay: Path, size_bytes: int, *, folding: bool = False) -> None:
    """Compare the tables of an overlay that nobody writes with each other.

    Clusters that nobody uses are none of its damage: a killed VMM leaves some. The head of one that
    may be `folding` may say what is below it, which is not opened. Raises BlobDamaged, and
    StorageFailed where they could not be compared, which is no word of the overlay.
    """
    _core.check_overlay(str(overlay), size_bytes, folding)
    file = {"driver": "file", "filename": str(overlay)}
    alone = json.dumps({"driver": "qcow2", "backing": None, "file": file})
    check = ("check", "-U", "-q", f"json:{alone}")
    qemu_img(overlay, *check, sound=(0, _LEAKS), memory_bytes=MEMORY_BYTES)
