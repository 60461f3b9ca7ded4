"""Digests of flat files (`DEVICE.sums`), which say what a flat file has to hold.

They are made of the builds and never of the flat file, so whatever became of that since it was
written shows in the next check. Nobody waits for them: they are made behind whoever made the file,
by a thread that gives way to everything else. Until then, and after a kill in between, a flat file
has none, and a check makes them first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from diapause import _core
from diapause.errors import BlobDamaged, BlobMissing, DiapauseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diapause.catalog import Catalog, DeviceRecord, SnapshotRecord
    from diapause.snapshot.flats import FlatStore
    from diapause.snapshot.leases import Leases
    from diapause.store.gate import Gate
    from diapause.store.home import Home

log = logging.getLogger("diapause.sums")
_NICE = 10


_BOUND_S = 60.0


class _Closing(Exception):
    """The daemon ends: what was not written by then is made by a check."""


class _HeldBack(Exception):
    """A collection begins: it is done again afterwards."""


class Digests:
    """The digests of one home's flat files."""

    def __init__(
        self, home: Home, catalog: Catalog, leases: Leases, gate: Gate, flats: FlatStore
    ) -> None:
        self._home, self._catalog, self._leases = home, catalog, leases
        self._gate, self._flats, self._closing = gate, flats, False
        self._behind = ThreadPoolExecutor(1, "diapause-digests", initializer=_give_way)
        self._turn = threading.Lock()  # of whoever makes some behind, or collects
        self._free = threading.Event()
        self._free.set()
        flats.on_made = self.make_behind

    def make_behind(self, record: SnapshotRecord) -> None:
        """Make those of a snapshot's flat files later; one that is not packed has to wait."""
        if record.state == "packed" and not self._closing:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._behind.submit(self._work, record)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """None are made behind in the block: what one is made of could not be collected."""
        self._free.clear()
        got = self._turn.acquire(timeout=_BOUND_S)
        try:
            yield
        finally:
            if got:
                self._turn.release()
            self._free.set()

    def _work(self, record: SnapshotRecord) -> None:
        self._free.wait(_BOUND_S)
        try:
            with self._turn:
                if self._catalog.snapshot(record.id) is not None:
                    with self._leases.hold(record.id, stands_back=True):
                        self._make(record, 1, self._check_wanted)
        except _HeldBack:
            self.make_behind(record)
        except _Closing:
            return
        except (DiapauseError, OSError) as error:  # a check says what is damaged
            log.warning("digests of the flat files of %s: %s", record.id, error)
        except Exception:
            log.exception("digests of the flat files of %s", record.id)

    def _check_wanted(self, *_: int) -> None:
        if self._closing:
            raise _Closing
        if not self._free.is_set():
            raise _HeldBack

    def make(
        self, record: SnapshotRecord, threads: int = 1, progress: _core.Progress | None = None
    ) -> int:
        """Make what is missing of a packed snapshot's; returns how many files were given some.

        Raises BlobDamaged or BlobMissing where a build is not what it has to be.
        """
        with self._leases.hold(record.id):  # its builds stay
            return self._make(record, threads, progress)

    def _make(self, record: SnapshotRecord, threads: int, progress: _core.Progress | None) -> int:
        made = 0
        for device in record.devices:
            flat = self._home.flat_of(record.id) / device.name
            sums = flat.with_name(f"{device.name}.sums")
            if not flat.exists() or sums.exists():
                continue
            found = self._sums(record, device, threads, progress)
            made += self._write(record.id, found, flat, sums)
        return made

    def _sums(
        self,
        record: SnapshotRecord,
        device: DeviceRecord,
        threads: int,
        progress: _core.Progress | None,
    ) -> _core.DeviceSums:
        header = self._home.snapshot(record.id) / f"{device.name}.header"
        own = (str(header), device.header_digest, str(self._home.builds))
        base = self._base(record, device.name)
        if base is not None:
            # What is wrong with the parent's is no word of this one's.
            with contextlib.suppress(BlobDamaged, BlobMissing):
                return _core.sum_device(*own, base, threads, progress)
        return _core.sum_device(*own, None, threads, progress)

    def _write(self, snapshot: str, found: _core.DeviceSums, flat: Path, sums: Path) -> int:
        """Beside the flat file, if that is still there; another of this snapshot is the same."""
        with self._gate.publishing(), self._flats.turn(snapshot):
            if not flat.exists() or sums.exists():
                return 0
            found.write(str(sums))
        return 1

    def _base(self, record: SnapshotRecord, device: str) -> tuple[str, str, str] | None:
        """The parent's, where there are any: most chunks have the same digests."""
        cold = record.cold and device == "memory"
        parent = self._catalog.snapshot(record.parent) if record.parent and not cold else None
        if parent is None or parent.state != "packed":
            return None
        header = self._home.snapshot(parent.id) / f"{device}.header"
        digest = next(d.header_digest for d in parent.devices if d.name == device)
        sums = self._home.flat_of(parent.id) / f"{device}.sums"
        return (str(header), digest, str(sums)) if sums.exists() else None

    def close(self) -> None:
        """Stop; returns when nothing is written any more."""
        self._closing = True
        self._behind.shutdown(wait=True, cancel_futures=True)


def _give_way() -> None:
    """Let everybody else have the processors first; of this thread alone, on Linux."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
