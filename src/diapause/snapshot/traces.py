"""Traces: what guests touched first after earlier resumes, given to the kernel ahead of the next.

A trace belongs to a snapshot's memory and lies below `traces/`; the pager writes and reads it. A
snapshot that was never resumed is brought by the trace of its nearest ancestor that was: the same
guest, a little earlier. What is recorded is merged with the trace that was used. Losing one costs
speed and nothing else, so nothing here fails a verb, and nothing is synced.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diapause.errors import PagerUnavailable
from diapause.limits import PREFETCH_BYTES_MAX, RECORD_S

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from diapause.catalog import Catalog, SnapshotRecord
    from diapause.pager.client import Pager
    from diapause.store.home import Home

log = logging.getLogger("diapause.traces")
# How far back an ancestor may lie whose trace is used.
_GENERATIONS_MAX = 16


@dataclass(frozen=True)
class _Recording:
    """A guest that runs on a snapshot's memory, and what was known when it began."""

    snapshot: str
    prior: Path | None
    due: float


class Traces:
    """The traces of one home."""

    def __init__(self, home: Home, catalog: Catalog, pager: Pager) -> None:
        self._home, self._catalog, self._pager = home, catalog, pager
        self._guard = threading.Lock()
        self._recordings: dict[str, _Recording] = {}  # by sandbox

    def replay(self, source: SnapshotRecord, budget_bytes: int) -> None:
        """Begin to bring what a guest on this snapshot will touch; the guest need not be there."""
        known = self._nearest(source)
        if known is None:
            return
        name = _file(source.id)
        try:
            # Pages are only taken of a file that the kernel knows.
            self._pager.path(name).stat()
            self._pager.prefetch(name, known, min(budget_bytes, PREFETCH_BYTES_MAX))
        except (PagerUnavailable, OSError) as error:
            log.info("%s is not brought ahead: %s", source.id, error)

    def begin(self, sandbox: str, source: SnapshotRecord) -> None:
        """A guest runs on the snapshot: what it touches is recorded."""
        due = time.monotonic() + RECORD_S
        with self._guard:
            self._recordings[sandbox] = _Recording(source.id, self._nearest(source), due)

    def settle(self, sandbox: str, *, if_due: bool = False) -> None:
        """Write down what was recorded of a sandbox, while its VMM is there; once."""
        with self._guard:
            found = self._recordings.get(sandbox)
            if found is None or (if_due and time.monotonic() < found.due):
                return
            del self._recordings[sandbox]
        try:
            self._home.traces.mkdir(mode=0o700, exist_ok=True)
            to = self._path(found.snapshot)
            prior = to if to.exists() else found.prior
            self._pager.trace(sandbox, _file(found.snapshot), prior, to)
        except (PagerUnavailable, OSError) as error:
            log.info("%s: what it touched is not recorded: %s", sandbox, error)

    def drop(self, sandbox: str) -> None:
        """Its VMM is gone."""
        with self._guard:
            self._recordings.pop(sandbox, None)

    def used(self, sandbox: str, snapshot: str) -> dict[str, Any] | None:
        """What was brought ahead of a VMM's memory, and what of it the VMM has touched.

        `prefetched_pages`, `used_pages`, `hit_rate` (0 to 1; null where nothing was brought), and
        `late`: whether a pager died meanwhile, and this counts from the next one's start.
        """
        try:
            said = self._pager.used(sandbox, _file(snapshot))
        except PagerUnavailable as error:
            log.info("%s: what it touched is not known: %s", sandbox, error)
            return None
        brought, used = said["prefetched_pages"], said["used_pages"]
        return {
            "prefetched_pages": brought, "used_pages": used,
            "hit_rate": round(used / brought, 4) if brought else None, "late": said["late"],
        }  # fmt: skip

    def forget(self, snapshots: Iterable[str]) -> None:
        """Snapshots are gone, and so are their traces."""
        for snapshot in snapshots:
            try:
                self._path(snapshot).unlink(missing_ok=True)
            except OSError as error:
                log.info("the trace of %s stays: %s", snapshot, error)

    def sweep(self) -> None:
        """What an earlier daemon, or pager, left of snapshots that are gone or in the middle."""
        if not self._home.traces.exists():
            return
        for path in self._home.traces.iterdir():
            snapshot, _, rest = path.name.partition(".")
            if rest != "memory" or self._catalog.snapshot(snapshot) is None:
                path.unlink(missing_ok=True)

    def _nearest(self, source: SnapshotRecord) -> Path | None:
        record: SnapshotRecord | None = source
        for _ in range(_GENERATIONS_MAX):
            if record is None or record.memory_bytes != source.memory_bytes:
                return None
            if (path := self._path(record.id)).exists():
                return path
            record = self._catalog.snapshot(record.parent) if record.parent is not None else None
        return None

    def _path(self, snapshot: str) -> Path:
        return self._home.traces / _file(snapshot)


def _file(snapshot: str) -> str:
    """The name of a snapshot's memory, as a file of the pager and of its trace alike."""
    return f"{snapshot}.memory"
