"""What a new sandbox starts from: made once for each size, then only read.

    templates/memory-SIZE/      memory (a hole of that size)  memory.header  template.json
    templates/ext4-SIZE/        disk0 (a fresh ext4)          disk0.header   template.json
    templates/root-DIGEST-SIZE/ disk0 (an image's root disk)  disk0.header   template.json
    templates/overlay-SIZE      an empty qcow2 overlay, copied for each running disk

The overlay has no backing file in its header: what is below it is said to the VMM by descriptor.
With 128 KiB clusters and extended L2 entries its allocation is exact to 4 KiB.
"""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from diapause import _core
from diapause.errors import BlobMissing, StorageFailed
from diapause.limits import MANIFEST_BYTES_MAX, SUBPROCESS_S
from diapause.store.files import fsync_path, read_file, remove_tree, storage_errors, write_file
from diapause.store.gate import Gate
from diapause.units import pages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diapause.store.home import Home


@dataclass(frozen=True)
class DeviceRoot:
    """A device nobody has written yet: its flat file, its header and that header's digest."""

    flat: Path
    header: Path
    digest: str


class _Template(msgspec.Struct):
    digest: str


class Templates:
    """The templates of one home."""

    def __init__(self, home: Home, gate: Gate | None = None) -> None:
        self._home, self._lock, self._gate = home, threading.Lock(), gate or Gate()

    def memory(self, size_bytes: int) -> DeviceRoot:
        """All-zero memory of this size."""
        return self._device(f"memory-{size_bytes}", "memory", size_bytes, _make_memory)

    def disk(self, size_bytes: int) -> DeviceRoot:
        """An empty ext4 file system of this size."""
        return self._device(f"ext4-{size_bytes}", "disk0", size_bytes, self._make_disk)

    def root_disk(self, digest: str, size_bytes: int, source: Path | None = None) -> DeviceRoot:
        """An image's root disk, its file system grown to this size; `source` is the image's file.

        Where it was never made, and nobody says what of, it is missing.
        """

        def make(fresh: Path, size_bytes: int) -> str:
            if source is None:
                raise BlobMissing(blob=f"templates/root-{digest}-{size_bytes}")
            return self._make_root_disk(fresh, size_bytes, source)

        return self._device(f"root-{digest}-{size_bytes}", "disk0", size_bytes, make)

    def _device(
        self, key: str, name: str, size_bytes: int, make: Callable[[Path, int], str]
    ) -> DeviceRoot:
        place = self._home.templates / key
        failures = storage_errors(f"template {key}", self._home.templates)
        with self._gate.publishing(), self._lock, failures:
            if not place.exists():
                self._build(place, size_bytes, make)
        data = read_file(place / "template.json", f"templates/{key}", MANIFEST_BYTES_MAX)
        digest = msgspec.json.decode(data, type=_Template).digest
        return DeviceRoot(flat=place / name, header=place / f"{name}.header", digest=digest)

    def _build(self, place: Path, size_bytes: int, make: Callable[[Path, int], str]) -> None:
        fresh = self._home.tmp / f"{place.name}-{os.urandom(4).hex()}"
        fresh.mkdir(mode=0o700)
        try:
            digest = make(fresh, size_bytes)
            self._sum(fresh, digest)
            data = msgspec.json.encode(_Template(digest))
            write_file(fresh / "template.json", data, sync=True)
            fsync_path(fresh)
            fresh.rename(place)
            fsync_path(place.parent)
        finally:
            remove_tree(fresh)

    def _sum(self, fresh: Path, digest: str) -> None:
        """What the flat file has to hold, of the builds it was made from."""
        [header] = fresh.glob("*.header")
        sums = header.with_suffix(".sums")
        _core.sum_device(str(header), digest, str(self._home.builds)).write(str(sums))
        fsync_path(sums)

    def _make_disk(self, fresh: Path, size_bytes: int) -> str:
        """mkfs, then packed and materialized again: the flat file is as sparse as can be."""
        raw, flat, header = fresh / "raw", fresh / "disk0", fresh / "disk0.header"
        with raw.open("xb") as file:
            file.truncate(size_bytes)
        _run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-L", "data",
             "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", str(raw))  # fmt: skip
        return self._kept(raw, flat, header, size_bytes)

    def _make_root_disk(self, fresh: Path, size_bytes: int, source: Path) -> str:
        """Grown in user space: no kernel of ours reads what an image brought."""
        raw, flat, header = fresh / "raw", fresh / "disk0", fresh / "disk0.header"
        _run("cp", "--sparse=always", "--no-preserve=all", str(source), str(raw))
        if size_bytes > raw.stat().st_size:
            with raw.open("r+b") as file:
                file.truncate(size_bytes)
            _run("resize2fs", "-f", str(raw))
        return self._kept(raw, flat, header, size_bytes)

    def _kept(self, raw: Path, flat: Path, header: Path, size_bytes: int) -> str:
        packed = _core.pack_file(
            str(raw), pages(size_bytes), str(self._home.builds), str(self._home.tmp), str(header)
        )
        raw.unlink()
        _core.materialize(
            str(header), packed.header_digest, str(self._home.builds), str(flat), sync=True
        )
        flat.chmod(0o400)
        return packed.header_digest

    def overlay(self, size_bytes: int, place: Path) -> None:
        """Put a new, empty overlay of this size at `place`."""
        template = self._home.templates / f"overlay-{size_bytes}"
        with self._gate.publishing(), storage_errors(f"overlay {place.name}", place.parent):
            with self._lock:
                if not template.exists():
                    self._make_overlay(template, size_bytes)
            data = template.read_bytes()  # about 200 KiB: metadata of an empty image
            write_file(place, data, sync=False, mode=0o600)

    def _make_overlay(self, template: Path, size_bytes: int) -> None:
        fresh = self._home.tmp / f"{template.name}-{os.urandom(4).hex()}"
        options = "cluster_size=128k,extended_l2=on"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(fresh), str(size_bytes))
        fresh.chmod(0o400)
        fsync_path(fresh)
        fresh.rename(template)


def _make_memory(fresh: Path, size_bytes: int) -> str:
    flat = fresh / "memory"
    with flat.open("xb") as file:
        file.truncate(size_bytes)
    flat.chmod(0o400)
    return _core.zero_header(str(fresh / "memory.header"), pages(size_bytes))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SUBPROCESS_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageFailed(what=command[0], cause=str(error)) from error
    if done.returncode != 0:
        raise StorageFailed(what=command[0], cause=done.stderr.strip()[-500:])
