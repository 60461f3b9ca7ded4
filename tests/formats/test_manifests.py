"""A snapshot's manifest: what an earlier version wrote is what this one expects to find."""

from __future__ import annotations

import msgspec
import pytest

from diapause.catalog import Identity, SnapshotRecord
from diapause.snapshot.manifest import manifest_bytes

# As the first version wrote it; the catalog's row of that snapshot holds the same fields.
FIRST = """\
{
 "version": 1,
 "id": "00112233aabbccdd",
 "name": null,
 "sandbox": "aabbccdd00112233",
 "parent": null,
 "state": "packed",
 "durability": "disk",
 "created_at": "2026-01-02T03:04:05.678Z",
 "boot_id": "b",
 "image": "tiny",
 "identity": {
  "kind": "qemu",
  "version": "7.2.0",
  "machine": "pc-q35-7.2",
  "cpu": "qemu64",
  "accelerator": "tcg",
  "processor": ""
 },
 "layout": 1,
 "command_line": [
  "-smp",
  "1"
 ],
 "memory_bytes": 134217728,
 "cpus": 1,
 "disks_bytes": [
  67108864
 ],
 "hostname": "h",
 "machine_id": "m",
 "agent": true,
 "dirty_source": "private",
 "dirty_pages": 3,
 "frozen_ms": 4.5,
 "state_bytes": 6,
 "state_digest": "d",
 "devices": [],
 "error": null
}"""


def test_the_manifest_of_an_earlier_version_is_not_taken_for_damaged() -> None:
    """A field that came later is not in it, and its snapshot has nothing of it."""
    record = msgspec.json.decode(FIRST, type=SnapshotRecord)
    assert record.identity == Identity("qemu", "7.2.0", "pc-q35-7.2", "qemu64", "tcg")
    assert manifest_bytes(record) == FIRST.encode()


@pytest.mark.parametrize(("field", "value"), [("net", "user"), ("root_disk", "00ff")])
def test_what_a_snapshot_has_of_a_later_field_is_in_its_manifest(field: str, value: str) -> None:
    """Or a machine with a network could pass for one without."""
    record = msgspec.json.decode(FIRST, type=SnapshotRecord)
    setattr(record, field, value)
    again = msgspec.json.decode(manifest_bytes(record), type=SnapshotRecord)
    assert getattr(again, field) == value
