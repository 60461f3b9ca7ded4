"""What a check reads of captures that are not packed, and of the disks that guests wrote.

A capture file has a sum for each page, a buffer on tmpfs has none. Nobody keeps a digest of an
overlay, since a VMM writes it: its tables are compared with each other where nobody writes it any
more, and its bytes are read to the end. Of one that a guest is writing its head is looked at, and
what is there is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diapause import _core, operation
from diapause.errors import DiapauseError
from diapause.snapshot.capture import CaptureFiles, check_structure, open_overlay

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.sandbox.upkeep.blobs import Blobs

_WRITTEN = ("running", "frozen", "pausing")
_AT_REST = ("stopped", "failed")


def add_capture(blobs: Blobs, record: SnapshotRecord, costs: list[str]) -> None:
    """The pages of a capture that is not packed; `costs` are the snapshots that need them."""
    files = CaptureFiles(blobs.host.home, record.id)
    name = blobs.name(files.memory)
    if record.durability == "process" and files.buffer.exists():
        spill = str(files.memory) if files.memory.exists() else ""
        blobs.add(
            "capture", files.buffer, spill, costs, called="capture buffer", how="structure",
            blob=name,
        )  # fmt: skip
    else:
        blobs.add("capture", files.memory, "", costs)
    for disk, size in enumerate(record.disks_bytes):
        number = 0
        while (overlay := files.overlay(f"disk{disk}", number)).exists():
            operation.checkpoint()
            _add_overlay(blobs, overlay, size, costs, [], mapped=True)
            number += 1
        if number == 0:
            blobs.found(overlay, "it is missing", costs, missing=True)


def add_disks(blobs: Blobs, record: SandboxRecord) -> None:
    """What a sandbox's disks have that no snapshot has."""
    if record.state not in _WRITTEN + _AT_REST:
        return  # paused: a snapshot has it; anything else: a verb is at it
    place = blobs.host.home.sandbox(record.id)
    for names, size in zip(record.overlays, record.disks_bytes, strict=False):
        for overlay in map(place.joinpath, names):
            operation.checkpoint()
            if record.state in _AT_REST:
                _add_overlay(blobs, overlay, size, [], [record.id], mapped=False)
            else:
                _add_written(blobs, overlay, size, record.id)


def _add_overlay(
    blobs: Blobs, overlay: Path, size: int, costs: list[str], sandboxes: list[str], *, mapped: bool
) -> None:
    try:
        check_structure(overlay, size, folding=not mapped)
        if mapped:
            open_overlay(overlay, size)
    except DiapauseError as error:
        blobs.failed(overlay, error, costs, sandboxes)
        return
    blobs.add("read", overlay, "", costs, called="overlay", how="structure", sandboxes=sandboxes)


def _add_written(blobs: Blobs, overlay: Path, size: int, sandbox: str) -> None:
    """Its tables are in motion: what its VMM has not written yet is no damage."""
    try:
        _core.check_overlay(str(overlay), size)
    except DiapauseError as error:
        blobs.failed(overlay, error, [], [sandbox])
        return
    blobs.add("read", overlay, "", [], called="overlay in use", how="read", sandboxes=[sandbox])


def still_there(blobs: Blobs, before: list[SandboxRecord]) -> None:
    """Forget what was found of overlays that a verb took, or that a guest began to write."""
    rows = {row.id: row for row in blobs.host.catalog.sandboxes()}
    changed = {
        was.id
        for was in before
        if (now := rows.get(was.id)) is None
        or (now.state, now.overlays, now.process) != (was.state, was.overlays, was.process)
    }
    places = tuple(f"sandboxes/{sandbox}/" for sandbox in changed)
    blobs.damage = [one for one in blobs.damage if not one.blob.startswith(places)]
