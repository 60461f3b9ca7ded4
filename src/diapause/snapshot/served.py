"""Snapshots as files of the pager: their devices can be opened before anybody has read them.

A packed snapshot is served from its headers and builds. One that is not packed is served from its
capture through a provisional header, which is kept below `served/` as long as the file points
there; the leases of what it maps to are held as long. When it has been packed, its files point to
the packed headers, before the capture goes. The bytes stay the same: a guest notices none of it.

The leases end with the daemon. The next one points every file anew before it packs or removes
anything (`adopt`).
"""

from __future__ import annotations

import logging
import shutil
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from diapause import _core, operation
from diapause.errors import (
    BlobDamaged,
    BlobMissing,
    DiapauseError,
    PagerUnavailable,
    SnapshotNotFound,
    StorageFailed,
)
from diapause.snapshot.flats import blobs_of
from diapause.snapshot.headers import DeviceHeader, Headers, damage_by_place
from diapause.store.files import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from diapause.catalog import Catalog, SnapshotRecord
    from diapause.pager.client import Pager
    from diapause.snapshot.leases import Leases
    from diapause.store.home import Home
    from diapause.store.templates import Templates

log = logging.getLogger("diapause.served")
_AT_ONCE = 4


class Served:
    """The files of one home's pager."""

    def __init__(
        self, home: Home, catalog: Catalog, templates: Templates, leases: Leases, pager: Pager
    ) -> None:
        self._home, self._catalog, self._pager = home, catalog, pager
        self._templates, self._leases = templates, leases
        self._guard = threading.Lock()
        self._provisional: dict[str, ExitStack] = {}  # by snapshot: what its files stand on
        # By snapshot: the pager that has its files, the state that they are of, their names.
        self._pointed: dict[str, tuple[str, str, dict[str, str]]] = {}

    def files(self, record: SnapshotRecord, instance: str) -> dict[str, str]:
        """The names of a snapshot's files in this pager, by device; there from now on.

        Raises PagerUnavailable; BlobMissing and BlobDamaged where its header can't be used.
        """
        with self._guard:
            there = self._pointed.get(record.id)
            if there is None or there[:2] != (instance, record.state):
                there = (instance, record.state, self._point(record))
                self._pointed[record.id] = there
            return there[2]

    def check(self, record: SnapshotRecord) -> None:
        """What costs little to see before a guest runs: every blob is there, headers are whole.

        Raises BlobMissing and BlobDamaged.
        """
        if record.state == "captured":
            return  # its provisional header is made of what there is
        for blob in blobs_of(self._home, record):
            if not blob.exists():
                raise BlobMissing(blob=str(blob.relative_to(self._home.root)))
        with damage_by_place(self._catalog):
            for device in record.devices:
                header = self._home.snapshot(record.id) / f"{device.name}.header"
                _core.header_info(str(header), device.header_digest)

    def verify(self, record: SnapshotRecord, devices: list[str]) -> None:
        """Read all that these devices are made of to its end, whoever else reads it.

        Raises BlobMissing and BlobDamaged; StorageFailed where something could not be read.
        """
        jobs: dict[tuple[str, str, str], str] = {}
        with (
            damage_by_place(self._catalog),
            Headers(self._home, self._catalog, self._templates, self._leases) as headers,
        ):
            for device in devices:
                header = headers.of(record, device)
                for build, _ in _core.header_info(str(header.path), header.digest).builds:
                    if build not in header.places:
                        path = self._home.builds / build
                        jobs["build", str(path), build] = f"builds/{build}"
                for place in header.places.values():
                    if not place.map:  # an overlay has no digest; its structure was looked at
                        spill = str(place.spill) if place.spill else ""
                        jobs["capture", str(place.path), spill] = f"captures/{record.id}/{device}"
            _read(jobs)

    def packed(self, record: SnapshotRecord) -> None:
        """A snapshot was packed: files that point to its capture point to its builds from now on.

        Where the pager can't be told they go on as they are, and the capture stays.
        """
        with self._guard:
            self._pointed.pop(record.id, None)
            if record.id not in self._provisional:
                return
            try:
                self._point(record)
            except DiapauseError as error:
                log.warning("%s is served from its capture still: %s", record.id, error)

    def adopt(self) -> None:
        """Point every file anew that an earlier daemon left; what nobody knows any more goes."""
        with self._guard:
            known = {name.partition(".")[0] for name in self._pager.names()}
            for snapshot in sorted(known):
                record = self._catalog.snapshot(snapshot)
                if record is None or record.state == "failed":
                    self._remove(snapshot)
                    continue
                try:
                    self._point(record)
                except DiapauseError as error:
                    log.warning("%s is served as it was: %s", snapshot, error)
            self._sweep(known)

    def sweep(self) -> None:
        """No pager is there: nothing that was kept for one is of any use."""
        with self._guard:
            self._sweep(set())

    def on_captures(self) -> frozenset[str]:
        """Snapshots whose files stand on captures, which they keep from going."""
        with self._guard:
            return frozenset(self._provisional)

    def forget(self, snapshot: str) -> None:
        """Let go of a snapshot's files, where no VMM runs on them."""
        with self._guard:
            self._remove(snapshot)

    def close(self) -> None:
        """Let go of everything; the pager goes on."""
        with self._guard:
            for scope in self._provisional.values():
                scope.close()
            self._provisional.clear()

    def _point(self, record: SnapshotRecord) -> dict[str, str]:
        scope = ExitStack()
        headers = scope.enter_context(
            Headers(self._home, self._catalog, self._templates, self._leases, stands_back=True)
        )
        try:
            names, provisional = {}, False
            for device in record.devices:
                names[device.name] = f"{record.id}.{device.name}"
                header = headers.of(record, device.name)
                spec = self._spec(names[device.name], header, device.size_bytes)
                self._pager.put(names[device.name], spec)
                provisional |= bool(header.places)
            if self._catalog.snapshot(record.id) is None:  # only now: gc may have been here
                raise SnapshotNotFound(reference=record.id, candidates="others")
        except BaseException:
            scope.close()
            raise
        before = self._provisional.pop(record.id, None)
        if provisional:
            self._provisional[record.id] = scope.pop_all()
        else:
            self._unlink(record.id)
        scope.close()
        if before is not None:
            before.close()
        return names

    def _spec(self, name: str, header: DeviceHeader, size_bytes: int) -> dict[str, Any]:
        path = header.path
        if header.places:
            path = self._keep(name, header)
        captures = [
            {
                "id": id_, "path": str(place.path),
                "spill": str(place.spill) if place.spill else None,
                "map": str(self._directory / f"{name}.{id_[:16]}.map") if place.map else None,
            }
            for id_, place in header.places.items()
        ]  # fmt: skip
        return {
            "size_bytes": size_bytes, "header": str(path), "header_digest": header.digest,
            "blobs": {"kind": "directory", "path": str(self._home.builds)},
            "captures": captures,
        }  # fmt: skip

    def _keep(self, name: str, header: DeviceHeader) -> Path:
        """A provisional header and the maps of overlays outlive their maker: a pager that is
        started again reads them once more."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for id_, place in header.places.items():
            if place.map:
                path = self._directory / f"{name}.{id_[:16]}.map"  # perhaps an earlier pair's
                replace_file(path, place.map, self._home.tmp, sync=False)
        kept = self._directory / f"{name}.header"
        fresh = self._home.tmp / f"{name}.header"
        shutil.copyfile(header.path, fresh)
        fresh.replace(kept)
        return kept

    @property
    def _directory(self) -> Path:
        return self._home.served

    def _remove(self, snapshot: str) -> None:
        self._pointed.pop(snapshot, None)
        for name in self._pager.names():
            if name.startswith(f"{snapshot}."):
                try:
                    self._pager.remove(name)
                except PagerUnavailable as error:
                    log.info("%s stays: %s", name, error)
                    return
        if (scope := self._provisional.pop(snapshot, None)) is not None:
            scope.close()
        self._unlink(snapshot)

    def _unlink(self, snapshot: str) -> None:
        for path in self._directory.glob(f"{snapshot}.*"):
            path.unlink(missing_ok=True)

    def _sweep(self, known: set[str]) -> None:
        """What an earlier daemon kept for files that are none."""
        if self._directory.exists():
            for path in self._directory.iterdir():
                if path.name.partition(".")[0] not in known:
                    path.unlink(missing_ok=True)


def _read(jobs: dict[tuple[str, str, str], str]) -> None:
    """Some at a time: between two lots it can be cancelled."""
    asked = list(jobs)
    for first in range(0, len(asked), _AT_ONCE):
        operation.checkpoint()
        operation.progress(first, len(asked), "verifying")
        lot = asked[first : first + _AT_ONCE]
        for at, cause, kind in _core.check_blobs(lot, _AT_ONCE):
            blob = jobs[lot[at]]
            if kind == "missing":
                raise BlobMissing(blob=blob)
            if kind == "damaged":
                raise BlobDamaged(blob=blob, cause=cause)
            raise StorageFailed(what=blob, cause=cause)
