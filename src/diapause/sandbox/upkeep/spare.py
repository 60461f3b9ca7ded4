"""Where the pages of a build lie besides: flat files of snapshots and of templates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from diapause.errors import DiapauseError
from diapause.limits import MANIFEST_BYTES_MAX
from diapause.store.files import read_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.sandbox.host import Host

Source = tuple[str, str, str, str | None]  # header, its digest, flat file, its digests


class _Template(msgspec.Struct):
    digest: str


def sources_of(host: Host, build: str) -> list[Source]:
    """As `_core.rebuild_build` wants them; those with digests come first."""
    found = [*_of_snapshots(host, build), *_of_templates(host)]
    return sorted(found, key=lambda source: source[3] is None)


def _of_snapshots(host: Host, build: str) -> Iterator[Source]:
    for record in host.catalog.snapshots(removed=True):
        place = host.home.flat_of(record.id)
        for device in record.devices:
            if build in device.builds and (place / device.name).exists():
                header = host.home.snapshot(record.id) / f"{device.name}.header"
                yield _source(header, device.header_digest, place / device.name)


def _of_templates(host: Host) -> Iterator[Source]:
    """Few, and their headers are small: whether they map to the build is seen as they are read."""
    for header in host.home.templates.glob("*/*.header"):
        try:
            data = read_file(header.with_name("template.json"), "a template", MANIFEST_BYTES_MAX)
            digest = msgspec.json.decode(data, type=_Template).digest
        except (DiapauseError, msgspec.DecodeError, OSError):
            continue
        flat = header.with_suffix("")
        if flat.exists():
            yield _source(header, digest, flat)


def _source(header: Path, digest: str, flat: Path) -> Source:
    sums = flat.with_name(f"{flat.name}.sums")
    return str(header), digest, str(flat), str(sums) if sums.exists() else None
