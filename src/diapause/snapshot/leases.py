"""Leases: a capture's files stay as long as somebody reads them.

A capture is removed when it has been packed. A resume that began before reads it through a
provisional header; it holds a lease meanwhile, and the removal happens when the last lease ends.

A reader that stands back for a collection says so: `gc` waits for its end and keeps nothing for it.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Leases:
    """Who reads which capture, and what waits for them to finish."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._yielding: Counter[str] = Counter()  # of those, by readers that stand back
        self._retired: dict[str, Callable[[], None]] = {}

    @contextmanager
    def hold(self, name: str, *, stands_back: bool = False) -> Iterator[None]:
        """Keep what `name` stands for until the block ends."""
        with self._lock:
            self._held[name] += 1
            self._yielding[name] += stands_back
        try:
            yield
        finally:
            self._release(name, stands_back)

    def _release(self, name: str, stands_back: bool) -> None:
        with self._lock:
            self._yielding[name] -= stands_back
            self._yielding += Counter()  # keeps what is above zero
            self._held[name] -= 1
            if self._held[name]:
                return
            del self._held[name]
            remove = self._retired.pop(name, None)
        if remove is not None:
            remove()

    def held(self) -> frozenset[str]:
        """What somebody reads now."""
        with self._lock:
            return frozenset(self._held)

    def held_firmly(self) -> frozenset[str]:
        """What a collection would have to keep."""
        with self._lock:
            return frozenset(self._held - self._yielding)

    def retire(self, name: str, remove: Callable[[], None]) -> None:
        """Call `remove` now, or when the last lease of `name` ends."""
        with self._lock:
            if self._held[name]:
                self._retired[name] = remove
                return
        remove()
