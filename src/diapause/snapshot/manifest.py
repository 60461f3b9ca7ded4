"""A snapshot's manifest: its record as a file, beside the headers and the device state.

The name is left out: it may change, and a manifest never does.
"""

import msgspec

from diapause.catalog import SnapshotRecord


def manifest_bytes(record: SnapshotRecord) -> bytes:
    """The manifest of a record, as JSON for people too."""
    nameless = msgspec.structs.replace(record, name=None)
    return msgspec.json.format(msgspec.json.encode(nameless), indent=1)
