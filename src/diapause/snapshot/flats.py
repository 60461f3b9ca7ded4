"""Flat files: a snapshot's devices as plain sparse files, until a pager exists.

Invariants:
- Every byte was verified when the file was made; afterwards it is read-only and never rewritten.
- `flat.json` keeps what the file system said of each file then (inode, size, times), of the flat
  files and of the blobs that they were made from. A flat file that was touched since is not used; a
  blob that was touched since is verified again before its snapshot is resumed.
- A running VMM maps flat files: a live mapping is a reference.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from diapause import _core, operation
from diapause.errors import BlobDamaged, BlobMissing, SnapshotNotFound, StorageFailed
from diapause.limits import DEVICE_STATE_BYTES_MAX, MANIFEST_BYTES_MAX, PACK_S
from diapause.snapshot.headers import Headers, damage_by_place
from diapause.snapshot.manifest import manifest_bytes
from diapause.store.boot import boot_id
from diapause.store.files import (
    read_file,
    remove_tree,
    replace_file,
    storage_errors,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diapause.catalog import Catalog, SnapshotRecord
    from diapause.snapshot.leases import Leases
    from diapause.store.gate import Gate
    from diapause.store.home import Home
    from diapause.store.templates import Templates


_LOOK_EVERY_S = 0.2


class Seen(msgspec.Struct, frozen=True):
    """What the file system says of a file; any write or replacement changes it."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Seen | None:
        """Of the file there now; None where there is none."""
        try:
            return cls._from(path.stat())
        except FileNotFoundError:
            return None

    @classmethod
    def of_open(cls, fd: int) -> Seen:
        """Of an open file, wherever it is now."""
        return cls._from(os.fstat(fd))

    @classmethod
    def _from(cls, found: os.stat_result) -> Seen:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class _Record(msgspec.Struct):
    boot_id: str  # flat files are not synced: after a crash of the host they are made again
    files: dict[str, Seen]
    blobs: dict[str, Seen]


@dataclass(frozen=True)
class Flat:
    """A snapshot's devices as files, by device name, and whether they had to be made."""

    files: dict[str, Path]
    made: bool


class FlatStore:
    """The flat files of one home."""

    def __init__(
        self, home: Home, catalog: Catalog, templates: Templates, leases: Leases, gate: Gate
    ) -> None:
        self._home, self._catalog, self._gate = home, catalog, gate
        self._templates, self._leases = templates, leases
        self._lock = threading.Lock()
        self._making: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self.on_made: Callable[[SnapshotRecord], object] = lambda record: None
        # A snapshot's flat files are about to go, with the names of their devices.
        self.on_gone: Callable[[str, list[str]], object] = lambda snapshot, devices: None

    def ensure(self, record: SnapshotRecord) -> Flat:
        """The flat files of a snapshot, made now where they are missing; verified either way."""
        with self._gate.publishing(), self.turn(record.id), damage_by_place(self._catalog):
            if self._catalog.snapshot(record.id) is None:  # only now: gc may have been here
                raise SnapshotNotFound(reference=record.id, candidates="others")
            self.verify_small(record)
            if (found := self._usable(record)) is not None:
                return found
            with storage_errors(f"flat files of {record.id}", self._home.flat):
                made = self._make(record)
        self.on_made(record)
        return made

    @contextmanager
    def turn(self, snapshot: str) -> Iterator[None]:
        """Nobody else writes into a snapshot's flat directory while the block runs."""
        with self._lock:
            making = self._making[snapshot]
        with _turn(making, snapshot):
            yield

    def packed(self, record: SnapshotRecord) -> None:
        """A snapshot was packed, which may have had flat files before."""
        if self._home.flat_of(record.id).exists():
            self.on_made(record)

    def drop(self, snapshot: str) -> None:
        """Remove a snapshot's flat files, which no process maps."""
        with self.turn(snapshot):
            self.going(snapshot)
            remove_tree(self._home.flat_of(snapshot))

    def going(self, snapshot: str) -> None:
        """Say that a snapshot's flat files are about to go, where there are any."""
        known = self._known(snapshot)
        if known is not None:
            self.on_gone(snapshot, sorted(known.files))

    @contextmanager
    def opened(self, record: SnapshotRecord) -> Iterator[dict[str, int]]:
        """Descriptors of a snapshot's flat files, by device, of those that are there and as they
        were when every byte was verified. Nothing is made for it, and no blob is looked at.
        """
        with ExitStack() as scope:
            known = self._known(record.id)
            if known is None or known.boot_id != boot_id():
                yield {}
                return
            sizes = {device.name: device.size_bytes for device in record.devices}
            found: dict[str, int] = {}
            for name, seen in known.files.items():
                try:
                    path = self._home.flat_of(record.id) / name
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except OSError:
                    continue
                scope.callback(os.close, fd)
                if Seen.of_open(fd) == seen and seen.size == sizes.get(name):
                    found[name] = fd
            yield found

    def verify_small(self, record: SnapshotRecord) -> None:
        """The manifest and the device state, whole, each time."""
        if record.state == "captured":
            return
        place = self._home.snapshot(record.id)
        manifest = read_file(
            place / "manifest.json", f"snapshots/{record.id}/manifest.json", MANIFEST_BYTES_MAX
        )
        if manifest != manifest_bytes(record):
            cause = "it differs from the catalog's record"
            raise BlobDamaged(blob=f"snapshots/{record.id}/manifest.json", cause=cause)

    def _usable(self, record: SnapshotRecord) -> Flat | None:
        place = self._home.flat_of(record.id)
        if (known := self._known(record.id)) is None:
            return None
        touched = any(Seen.of(place / name) != seen for name, seen in known.files.items())
        if touched or known.boot_id != boot_id():
            return None  # what was verified is not what is there: made again
        if (fresh := self._verify_touched(record, known)) is not known:
            data = msgspec.json.encode(fresh)
            replace_file(place / "flat.json", data, self._home.tmp, sync=False)
        return Flat({name: place / name for name in known.files}, made=False)

    def of_this_boot(self, snapshot: str) -> bool:
        """Whether the flat files of a snapshot were made since the host started.

        Others are never used: a crash of the host may have torn them.
        """
        known = self._known(snapshot)
        return known is not None and known.boot_id == boot_id()

    def _known(self, snapshot: str) -> _Record | None:
        """What was noted when they were made; None where that can't be read: it was never synced,
        a crash of the host may have torn it, or they are being made again."""
        path = self._home.flat_of(snapshot) / "flat.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Record)
        except (msgspec.DecodeError, FileNotFoundError):
            return None

    def _verify_touched(self, record: SnapshotRecord, known: _Record) -> _Record:
        """Read again, whole, every blob that is not as it was when the flat files were made."""
        blobs = dict(known.blobs)
        for blob in blobs_of(self._home, record):
            name = str(blob.relative_to(self._home.root))
            if (seen := Seen.of(blob)) is None:
                raise BlobMissing(blob=name)
            if blobs.get(name) != seen:
                self._verify_blob(record, blob)
                blobs[name] = seen
        return known if blobs == known.blobs else _Record(known.boot_id, known.files, blobs)

    def _verify_blob(self, record: SnapshotRecord, blob: Path) -> None:
        if blob.parent == self._home.builds:
            _core.verify_build(str(blob), blob.name)
            return
        device = next(d for d in record.devices if f"{d.name}.header" == blob.name)
        _core.header_info(str(blob), device.header_digest)

    def _make(self, record: SnapshotRecord) -> Flat:
        fresh = self._home.tmp / f"flat-{record.id}-{os.urandom(4).hex()}"
        fresh.mkdir(mode=0o700)
        try:
            with Headers(self._home, self._catalog, self._templates, self._leases) as headers:
                total = sum(device.size_bytes for device in record.devices)
                done = 0
                for device in record.devices:
                    operation.checkpoint()
                    operation.progress(done, total, "flat files")
                    self._make_device(headers, record, device.name, fresh / device.name)
                    done += device.size_bytes
                operation.progress(done, total, "flat files")
            self._remember(record, fresh)
            place = self._home.flat_of(record.id)
            self.going(record.id)
            remove_tree(place)
            fresh.rename(place)
        finally:
            remove_tree(fresh)
        return Flat({d.name: place / d.name for d in record.devices}, made=True)

    def _make_device(
        self, headers: Headers, record: SnapshotRecord, device: str, out: Path
    ) -> None:
        header = headers.of(record, device)
        _core.materialize(
            str(header.path), header.digest, str(self._home.builds), str(out),
            header.captures, self._base(headers, record, device),
        )  # fmt: skip
        out.chmod(0o400)

    def _base(
        self, headers: Headers, record: SnapshotRecord, device: str
    ) -> tuple[str, str, str] | None:
        """The parent's flat file, when it is one that can be trusted."""
        flat = self.of_parent(record, device)
        header = headers.parent(record, device) if flat else None
        if flat is None or header is None or header.captures:
            return None
        return str(flat), str(header.path), header.digest

    def of_parent(self, record: SnapshotRecord, device: str) -> Path | None:
        """The flat file of the parent's device, where there is one that can be trusted."""
        cold = record.cold and device == "memory"
        parent = self._catalog.snapshot(record.parent) if record.parent and not cold else None
        try:
            flat = self._usable(parent) if parent is not None else None
        except (BlobDamaged, BlobMissing):
            return None  # not the child's: what it needs of its parent is verified as it is read
        return flat.files[device] if flat is not None else None

    def _remember(self, record: SnapshotRecord, place: Path) -> None:
        files = {d.name: Seen.of(place / d.name) for d in record.devices}
        found = {blob: Seen.of(blob) for blob in blobs_of(self._home, record)}
        blobs = {
            str(blob.relative_to(self._home.root)): seen for blob, seen in found.items() if seen
        }
        data = msgspec.json.encode(_Record(boot_id(), {n: s for n, s in files.items() if s}, blobs))
        write_file(place / "flat.json", data, sync=False)

    def device_state(self, record: SnapshotRecord) -> Path:
        """The snapshot's device state, verified."""
        captured = record.state == "captured"
        place = self._home.capture(record.id) if captured else self._home.snapshot(record.id)
        blob = f"{place.parent.name}/{record.id}/device-state"
        data = read_file(place / "device-state", blob, DEVICE_STATE_BYTES_MAX)
        if len(data) != record.state_bytes or _core.blake3_bytes(data) != record.state_digest:
            raise BlobDamaged(blob=blob, cause="its digest differs from the record's")
        return place / "device-state"


@contextmanager
def _turn(making: threading.Lock, snapshot: str) -> Iterator[None]:
    """Wait while another makes the same files; bounded, and a cancel is seen."""
    deadline = time.monotonic() + PACK_S
    while not making.acquire(timeout=_LOOK_EVERY_S):
        operation.checkpoint()
        if time.monotonic() > deadline:
            what, cause = f"flat files of {snapshot}", f"others have been at it for {PACK_S:.0f} s"
            raise StorageFailed(what=what, cause=cause)
    try:
        yield
    finally:
        making.release()


def blobs_of(home: Home, record: SnapshotRecord) -> list[Path]:
    """The blobs that a packed snapshot's devices need; a capture has none yet."""
    if record.state == "captured":
        return []
    headers = [home.snapshot(record.id) / f"{d.name}.header" for d in record.devices]
    builds = {home.builds / build for device in record.devices for build in device.builds}
    return headers + sorted(builds)
