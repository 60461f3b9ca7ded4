"""check: reads what a home holds, and names what is damaged and whom that costs.

What is read: builds, headers, manifests and device states of every snapshot, captures that are not
packed, disks of sandboxes, flat files against their digests, templates, images, the catalog. What
nothing refers to is no damage: it is listed, as `gc` would free it.

The gate is held, which keeps out `gc` alone: captures and packing go on beside it.

A flat file that has no digests yet is given some, of the builds that it was made from, and is then
compared with them as the others are.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from diapause import _core, operation
from diapause.errors import BlobDamaged, BlobMissing, DiapauseError
from diapause.guest import images
from diapause.limits import MANIFEST_BYTES_MAX
from diapause.model import CheckAnswer, Damage
from diapause.sandbox.upkeep import unpacked, world
from diapause.sandbox.upkeep.blobs import Blobs, threads
from diapause.sandbox.upkeep.collect import Found
from diapause.sandbox.upkeep.garbage import is_removed
from diapause.snapshot.capture import check_structure
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.files import read_file
from diapause.units import pages

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.sandbox.host import Host


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
            for sandbox in sandboxes:
                unpacked.add_disks(blobs, sandbox)
            _add_templates(blobs)
            _check_images(blobs)
            _check_catalog(blobs)
        blobs.read()
        _read_packed(blobs, wanted)
        unpacked.still_there(blobs, sandboxes)
        unreferenced = [] if only else [item for item, _ in Found(host, world.look(host)).items]
    for damage in blobs.damage:
        damage.sandboxes += _users(damage, sandboxes)
    return CheckAnswer(
        damage=blobs.damage, blobs=len(blobs.jobs), kinds=blobs.kinds(), recorded=blobs.recorded,
        unchecked=blobs.unchecked, stale=blobs.stale, unreferenced=unreferenced,
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
    blobs.damage = [one for one in blobs.damage if not one.blob.startswith(gone)]
    blobs.merge(again)


def look_again(host: Host, found: list[Damage]) -> dict[str, Damage]:
    """Read once more what costs snapshots; what is still not whole, by its name."""
    names = {damage.blob for damage in found}
    costs = {snapshot for damage in found for snapshot in damage.snapshots}
    blobs = Blobs(host)
    with host.gate.publishing():
        _, snapshots = host.catalog.everything()
        wanted = [row for row in snapshots if row.id in costs and row.state != "failed"]
        _add_snapshots(blobs, wanted, snapshots)
        blobs.jobs = [job for job in blobs.jobs if job.blob in names]
        blobs.read()
    return {damage.blob: damage for damage in blobs.damage if damage.blob in names}


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
    rows = {record.id: record for record in snapshots}
    builds, captures = dict[str, list[str]](), dict[str, list[str]]()
    for record in snapshots:
        for one in _stands_on(record, rows):
            needs = captures.setdefault(one.id, []) if one.state == "captured" else None
            if is_removed(record):
                continue
            if needs is not None:
                needs.append(record.id)
                continue
            for build in {build for device in one.devices for build in device.builds}:
                builds.setdefault(build, []).append(record.id)
    home, own = blobs.host.home, set[str]()
    for record in wanted:
        captured = record.state == "captured"
        place = home.capture(record.id) if captured else home.snapshot(record.id)
        costs = [record.id]
        blobs.add(
            "whole", place / "device-state", record.state_digest, costs, called="device state"
        )
        own |= {build for device in record.devices for build in device.builds}
        if captured:
            unpacked.add_capture(blobs, record, captures[record.id])
            continue
        for device in record.devices:
            blobs.add("header", place / f"{device.name}.header", device.header_digest, costs)
        _check_manifest(blobs, record)
    for build in sorted(own):
        blobs.add("build", home.builds / build, build, builds.get(build, []))


def _stands_on(record: SnapshotRecord, rows: dict[str, SnapshotRecord]) -> list[SnapshotRecord]:
    """The snapshot, and where it is not packed those that its pages are over, down to a packed."""
    found = [record]
    while record.state == "captured" and record.parent in rows:
        record = rows[record.parent]
        found.append(record)
    return found


def _check_manifest(blobs: Blobs, record: SnapshotRecord) -> None:
    path = blobs.host.home.snapshot(record.id) / "manifest.json"
    blobs.count("manifest", "compared", path)
    try:
        data = read_file(path, str(path), MANIFEST_BYTES_MAX)
    except (DiapauseError, OSError) as error:
        blobs.failed(path, error, [record.id])
        return
    if data != manifest_bytes(record):
        blobs.found(path, "it differs from the catalog's record", [record.id])


def _add_flats(blobs: Blobs, record: SnapshotRecord) -> None:
    """A flat file costs nobody a snapshot: it is made again, unless a guest runs on it."""
    host = blobs.host
    place = host.home.flat_of(record.id)
    if not place.exists():
        return
    if not host.flats.of_this_boot(record.id):
        blobs.stale += len(record.devices)  # never used, made again when needed
        return
    if record.state == "packed":  # a build that is damaged is found by itself
        with contextlib.suppress(BlobDamaged, BlobMissing):
            blobs.recorded += host.digests.make(
                record, threads(), lambda *_: operation.checkpoint()
            )
    for device in record.devices:
        flat, sums = place / device.name, place / f"{device.name}.sums"
        if sums.exists():
            blobs.add("flat", flat, str(sums), [], called="flat file")
        else:
            blobs.unchecked += 1


class _Template(msgspec.Struct):
    digest: str


def _add_templates(blobs: Blobs) -> None:
    for place in sorted(blobs.host.home.templates.iterdir()):
        kind, _, size = place.name.partition("-")
        if kind == "overlay":
            _add_empty_overlay(blobs, place, int(size))
            continue
        device = "memory" if kind == "memory" else "disk0"
        header, flat, sums = (place / f"{device}{end}" for end in (".header", "", ".sums"))
        try:
            data = read_file(place / "template.json", place.name, MANIFEST_BYTES_MAX)
            digest = msgspec.json.decode(data, type=_Template).digest
        except (DiapauseError, msgspec.DecodeError, OSError) as error:
            blobs.found(place / "template.json", str(error), [])
            continue
        blobs.add("header", header, digest, [])
        _add_builds_of_template(blobs, header, digest)
        size_bytes = pages(int(size.rpartition("-")[2])) * _core.PAGE_SIZE
        if not flat.exists() or flat.stat().st_size != size_bytes:
            blobs.found(flat, "it is missing or of another size", [], missing=not flat.exists())
            continue
        if not sums.exists():  # of an older Diapause
            with contextlib.suppress(BlobDamaged, BlobMissing):
                builds = str(blobs.host.home.builds)
                _core.sum_device(str(header), digest, builds).write(str(sums))
                blobs.recorded += 1
        if sums.exists():
            blobs.add("flat", flat, str(sums), [], called="template")
        else:
            blobs.unchecked += 1


def _add_builds_of_template(blobs: Blobs, header: Path, digest: str) -> None:
    """Those that no snapshot needs: what is captured of a guest that began here is over them."""
    known = {job.blob for job in blobs.jobs}
    with contextlib.suppress(DiapauseError):  # a header that is damaged is found by itself
        for build, _ in _core.header_info(str(header), digest).builds:
            if f"builds/{build}" not in known:
                blobs.add("build", blobs.host.home.builds / build, build, [])


def _add_empty_overlay(blobs: Blobs, place: Path, size_bytes: int) -> None:
    try:
        check_structure(place, size_bytes)
    except DiapauseError as error:
        blobs.failed(place, error, [])
        return
    blobs.add("read", place, "", [], called="template", how="structure")


def _check_images(blobs: Blobs) -> None:
    home = blobs.host.home
    for name in images.names(home):
        blobs.count("image", "digest", home.image(name))
        try:
            images.open_image(home.image(name)).verify()
        except DiapauseError as error:
            cause = str(error.fields.get("cause"))
            blobs.damage.append(Damage(blob=f"images/{name}", cause=cause))


def _check_catalog(blobs: Blobs) -> None:
    home = blobs.host.home
    blobs.count("catalog", "structure", home.catalog)
    for line in blobs.host.catalog.integrity():
        blobs.found(home.catalog, line, [])
