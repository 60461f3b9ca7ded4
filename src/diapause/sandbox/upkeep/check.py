"""check: reads what a home holds, and names what is damaged and whom that costs.

What is read: builds, headers, manifests and device states of every snapshot, flat files against
their digests, templates, images, the catalog. The pages of a capture that is not packed yet are
verified when it is packed or resumed; here its device state is. What nothing refers to is no
damage: it is listed, as `gc` would free it.

The gate is held, which keeps out `gc` alone: captures and packing go on beside it.

A flat file of this boot that nobody touched and that has no digests yet is given them: it was
verified when it was made, and from now on it is by itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from diapause import _core, operation
from diapause.errors import DiapauseError
from diapause.guest import images
from diapause.limits import MANIFEST_BYTES_MAX
from diapause.model import CheckAnswer, Damage
from diapause.sandbox.upkeep import world
from diapause.sandbox.upkeep.collect import Found
from diapause.sandbox.upkeep.garbage import is_removed
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.files import allocated_bytes, read_file
from diapause.units import MIB, pages

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.sandbox.host import Host

_THREADS_MAX = 8
_BATCH_BYTES = 256 * MIB  # between two looks whether it was cancelled


@dataclass
class Blobs:
    """What is to be read, with the snapshots that each blob costs."""

    host: Host
    jobs: list[tuple[str, str, str]] = field(default_factory=list)
    costs: list[list[str]] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    recorded: int = 0
    stale: int = 0

    def add(self, kind: str, path: Path, known: str, costs: list[str]) -> None:
        """Read one, of a kind of `_core.check_blobs`, and compare it with what is known."""
        self.jobs.append((kind, str(path), known))
        self.costs.append(costs)

    def found(self, path: Path, cause: str, costs: list[str], *, missing: bool = False) -> None:
        """Note damage that was seen at once."""
        blob = str(path.relative_to(self.host.home.root))
        self.damage.append(Damage(blob=blob, cause=cause, missing=missing, snapshots=costs))

    def read(self) -> None:
        """Read all of them and note what is not what it has to be; can be cancelled in between."""
        sizes = [allocated_bytes(Path(path)) for _, path, _ in self.jobs]
        total, first, done = sum(sizes), 0, 0
        while first < len(self.jobs):
            operation.checkpoint()
            operation.progress(done, total, "reading")
            end, size = first, 0
            while end < len(self.jobs) and size < _BATCH_BYTES:
                size += sizes[end]
                end += 1
            self._read(first, end)
            first, done = end, done + size
        operation.progress(total, total, "reading")

    def _read(self, first: int, end: int) -> None:
        threads = min(len(os.sched_getaffinity(0)), _THREADS_MAX)
        root = self.host.home.root
        for at, cause, missing in _core.check_blobs(self.jobs[first:end], threads):
            blob = os.path.relpath(self.jobs[first + at][1], root)
            costs = self.costs[first + at]
            self.damage.append(Damage(blob=blob, cause=cause, missing=missing, snapshots=costs))


def check(host: Host, only: SnapshotRecord | None = None) -> CheckAnswer:
    """Read everything, or what one snapshot is made of."""
    blobs = Blobs(host)
    with host.gate.publishing():  # nothing goes while it is read
        sandboxes, snapshots = host.catalog.everything()
        wanted = [only] if only else [row for row in snapshots if row.state != "failed"]
        _add_snapshots(blobs, wanted, snapshots)
        for record in wanted:
            operation.checkpoint()
            _add_flats(blobs, record)
        if only is None:
            _add_templates(blobs)
            _check_images(blobs)
            _check_catalog(blobs)
        blobs.read()
        _read_packed(blobs, wanted)
        unreferenced = [] if only else [item for item, _ in Found(host, world.look(host)).items]
    for damage in blobs.damage:
        damage.sandboxes = _users(damage, sandboxes)
    return CheckAnswer(
        damage=blobs.damage, blobs=len(blobs.jobs), recorded=blobs.recorded, stale=blobs.stale,
        unreferenced=unreferenced,
    )  # fmt: skip


def _read_packed(blobs: Blobs, wanted: list[SnapshotRecord]) -> None:
    """What was a capture when the rows were read and was packed since: its files are others."""
    captured = {row.id for row in wanted if row.state == "captured"}
    rows = blobs.host.catalog.snapshots(removed=True) if captured else []
    packed = [row for row in rows if row.id in captured and row.state == "packed"]
    gone = tuple(f"captures/{row.id}/" for row in packed)
    again = Blobs(blobs.host)
    _add_snapshots(again, packed, rows)
    again.read()
    blobs.damage = [one for one in blobs.damage if not one.blob.startswith(gone)] + again.damage
    blobs.jobs += again.jobs


def _users(damage: Damage, sandboxes: list[SandboxRecord]) -> list[str]:
    image = damage.blob.split("/")[1] if damage.blob.startswith("images/") else None
    flat = damage.blob.split("/")[1] if damage.blob.startswith("flat/") else None
    return [
        row.id
        for row in sandboxes
        if row.snapshot in damage.snapshots
        or (image is not None and row.image == image)
        or (flat is not None and row.root == flat)
    ]


def _add_snapshots(
    blobs: Blobs, wanted: list[SnapshotRecord], snapshots: list[SnapshotRecord]
) -> None:
    users: dict[str, list[str]] = {}
    for record in snapshots:
        if is_removed(record):
            continue
        for build in {build for device in record.devices for build in device.builds}:
            users.setdefault(build, []).append(record.id)
    home, builds = blobs.host.home, set[str]()
    for record in wanted:
        captured = record.state == "captured"
        place = home.capture(record.id) if captured else home.snapshot(record.id)
        costs = [record.id]
        blobs.add("whole", place / "device-state", record.state_digest, costs)
        builds |= {build for device in record.devices for build in device.builds}
        if captured:
            continue
        for device in record.devices:
            blobs.add("header", place / f"{device.name}.header", device.header_digest, costs)
        _check_manifest(blobs, record)
    for build in sorted(builds):
        blobs.add("build", home.builds / build, build, users.get(build, []))


def _check_manifest(blobs: Blobs, record: SnapshotRecord) -> None:
    path = blobs.host.home.snapshot(record.id) / "manifest.json"
    try:
        data = read_file(path, str(path), MANIFEST_BYTES_MAX)
    except DiapauseError as error:
        missing = error.code == "blob_missing"
        cause = "it is missing" if missing else str(error.fields.get("cause"))
        blobs.found(path, cause, [record.id], missing=missing)
        return
    except OSError as error:
        blobs.found(path, str(error), [record.id])
        return
    if data != manifest_bytes(record):
        blobs.found(path, "it differs from the catalog's record", [record.id])


def _add_flats(blobs: Blobs, record: SnapshotRecord) -> None:
    """A flat file costs nobody a snapshot: it is made again, unless a guest runs on it."""
    place = blobs.host.home.flat_of(record.id)
    if not place.exists():
        return
    known = blobs.host.flats.known_files(record.id)
    for device in record.devices:
        path, sums = place / device.name, place / f"{device.name}.sums"
        if sums.exists():
            blobs.add("flat", path, str(sums), [])
        elif known is None:
            blobs.stale += 1  # touched, or of another boot: never used, made again when needed
        else:
            _core.sum_flat(str(path), str(sums))
            if blobs.host.flats.known_files(record.id) is None:
                sums.unlink(missing_ok=True)
            blobs.recorded += 1


class _Template(msgspec.Struct):
    digest: str


def _add_templates(blobs: Blobs) -> None:
    for place in sorted(blobs.host.home.templates.iterdir()):
        kind, _, size = place.name.partition("-")
        if kind not in ("ext4", "memory"):
            continue
        device = "memory" if kind == "memory" else "disk0"
        try:
            data = read_file(place / "template.json", place.name, MANIFEST_BYTES_MAX)
            digest = msgspec.json.decode(data, type=_Template).digest
        except (DiapauseError, msgspec.DecodeError, OSError) as error:
            blobs.found(place / "template.json", str(error), [])
            continue
        blobs.add("header", place / f"{device}.header", digest, [])
        flat = place / device
        if not flat.exists() or flat.stat().st_size != pages(int(size)) * _core.PAGE_SIZE:
            blobs.found(flat, "it is missing or of another size", [], missing=not flat.exists())
            continue
        sums = place / f"{device}.sums"
        if sums.exists():
            blobs.add("flat", flat, str(sums), [])
        else:
            _core.sum_flat(str(flat), str(sums))
            blobs.recorded += 1


def _check_images(blobs: Blobs) -> None:
    home = blobs.host.home
    for name in images.names(home):
        try:
            images.open_image(home.image(name)).verify()
        except DiapauseError as error:
            cause = str(error.fields.get("cause"))
            blobs.damage.append(Damage(blob=f"images/{name}", cause=cause))


def _check_catalog(blobs: Blobs) -> None:
    home = blobs.host.home
    for line in blobs.host.catalog.integrity():
        blobs.found(home.catalog, line, [])
