"""A snapshot's manifest: its record as a file, beside the headers and the device state.

The name is left out, and whether it was removed: they may change, and a manifest never does. So is
what a snapshot has nothing of, where an earlier version did not know the field: its manifests must
stay as they are.
"""

import msgspec

from diapause.catalog import SnapshotRecord

_LATER_FIELDS = {"net": "none", "root_disk": None, "cold": False}


def manifest_bytes(record: SnapshotRecord) -> bytes:
    """The manifest of a record, as JSON for people too."""
    fields = msgspec.structs.asdict(msgspec.structs.replace(record, name=None))
    del fields["removed_at"]
    for field, nothing in _LATER_FIELDS.items():
        if fields[field] == nothing:
            del fields[field]
    return msgspec.json.format(msgspec.json.encode(fields), indent=1)
