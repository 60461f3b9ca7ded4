"""A snapshot whose row can't be read is known by its manifest, which lies beside its blobs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from diapause.catalog import SnapshotRecord, is_unreadable
from diapause.errors import DiapauseError
from diapause.limits import MANIFEST_BYTES_MAX
from diapause.snapshot.capture import CaptureFiles
from diapause.store.files import read_file

if TYPE_CHECKING:
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.recovery")
_DECODER = msgspec.json.Decoder(SnapshotRecord)


def mend_snapshot_rows(host: Host) -> None:
    """Write each row that can't be read again from its manifest, where there is one.

    A manifest does not say whether its snapshot was removed: such a one is there again.
    """
    for record in host.catalog.snapshots(removed=True):
        if not is_unreadable(record):
            continue
        if host.catalog.snapshot_state(record.id) == "failed":
            continue  # its manifest does not know what was lost later
        if (found := _from_manifest(host, record)) is None:
            log.warning("the row of snapshot %s can't be read, nor its manifest", record.id)
            continue
        host.catalog.put_snapshot(found, durable=True)
        how = "written again from its manifest"
        host.event("repaired", blob=f"catalog.sqlite3/snapshots/{record.id}", how=how)


def _from_manifest(host: Host, record: SnapshotRecord) -> SnapshotRecord | None:
    """The packed one's before the capture's: it may have been packed with its row still to come."""
    packed = host.home.snapshot(record.id) / "manifest.json"
    for path in (packed, CaptureFiles(host.home, record.id).manifest):
        try:
            found = _DECODER.decode(read_file(path, path.name, MANIFEST_BYTES_MAX))
        except (DiapauseError, OSError, msgspec.DecodeError, UnicodeDecodeError):
            continue
        if found.id == record.id:
            return msgspec.structs.replace(found, name=record.name)
    return None
