"""A few MiB kept aside, so that what frees space works on a full disk.

`rm`, `snapshot rm` and `gc` write to the catalog before they delete anything. Where the disk is
full the reserve is given back to the file system for the time that they need, and made again when
they have freed something.
"""

from __future__ import annotations

import contextlib
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diapause.store.files import free_bytes
from diapause.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diapause.store.home import Home

RESERVE_BYTES = 4 * MIB


class Reserve:
    """The reserve of one home."""

    def __init__(self, home: Home) -> None:
        self._home, self._lock = home, threading.Lock()
        self._users = 0

    @contextmanager
    def room(self) -> Iterator[None]:
        """Room for a verb that frees space; afterwards the reserve is made again if it can be."""
        with self._lock:
            self._users += 1
            if free_bytes(self._home.root) < RESERVE_BYTES:
                self._home.reserve.unlink(missing_ok=True)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._make()

    def make(self) -> None:
        """Set it aside, if there is room and it isn't there."""
        with self._lock:
            if not self._users:
                self._make()

    def _make(self) -> None:
        place = self._home.reserve
        if place.exists() or free_bytes(self._home.root) < 2 * RESERVE_BYTES:
            return
        fresh = self._home.tmp / "reserve"
        with contextlib.suppress(OSError):  # as well without: it is tried again
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)
            fresh.rename(place)
