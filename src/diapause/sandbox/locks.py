"""One verb at a time on a sandbox; others wait their turn, within a bound."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diapause.errors import Busy
from diapause.limits import LOCK_S

if TYPE_CHECKING:
    from collections.abc import Iterator


class SandboxLocks:
    """A lock for each sandbox of the home."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    @contextmanager
    def hold(self, sandbox: str, bound_s: float = LOCK_S) -> Iterator[None]:
        """Hold the sandbox for the block; raises Busy at the bound."""
        with self._guard:
            lock = self._locks[sandbox]
        if not lock.acquire(timeout=bound_s):
            raise Busy(sandbox=sandbox, waited_s=bound_s)
        try:
            yield
        finally:
            lock.release()
