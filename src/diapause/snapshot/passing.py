"""Files of the pager that are passed through: who opens one reads the snapshot's flat file.

A flat file was verified whole when it was made and nobody has written it since (`FlatStore.opened`
looks, by its descriptor), so the pager has nothing to add to it: the kernel is told to read it in
the place of the served file, at its own speed. Nothing is materialized for that. Where it can't be
done the file is served, and nobody need know: the bytes are the same.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from diapause.errors import PagerUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diapause.catalog import SnapshotRecord
    from diapause.pager.client import Pager
    from diapause.snapshot.flats import FlatStore

log = logging.getLogger("diapause.passing")


class Passing:
    """What one home's pager passes through."""

    def __init__(self, flats: FlatStore, pager: Pager) -> None:
        self._flats, self._pager = flats, pager
        self._guard = threading.Lock()
        self._instance = ""
        self._not: set[str] = set()  # files that this pager was told not to pass through

    def offer(self, record: SnapshotRecord, files: Mapping[str, str], instance: str) -> None:
        """Have the files of a snapshot passed through that have a flat file now, and no others.

        Whoever opens one afterwards gets what was decided here; who has it open keeps what it is.
        """
        with self._guard, self._flats.opened(record) as flat:
            if instance != self._instance:
                self._instance, self._not = instance, set()
            for device, name in files.items():
                self._pass(name, flat.get(device))

    def _pass(self, name: str, fd: int | None) -> None:
        if fd is None and name in self._not:
            return
        try:
            cause = self._pager.pass_through(name, fd)
        except PagerUnavailable as error:  # perhaps one of an earlier version
            log.info("%s is served: %s", name, error)
            return
        if cause is None:
            self._not.discard(name)
            return
        self._not.add(name)
        if fd is not None:
            log.info("%s is served: %s", name, cause)

    def take_back(self, snapshot: str, devices: list[str]) -> None:
        """A snapshot's flat files are about to go: nobody else is passed through to them."""
        with self._guard:
            for device in devices:
                name = f"{snapshot}.{device}"
                try:
                    self._pager.pass_through(name, None)
                    self._not.add(name)
                except PagerUnavailable as error:
                    log.debug("%s is not taken back: %s", name, error)  # most never were
