"""The gate between those who publish shared files and `gc`, which alone deletes them.

A publisher makes files first and the row that refers to them later: in between they look like
garbage. So whoever publishes, or looks for a file and is about to use it, is inside `publishing`,
and `gc` plans and deletes inside `collecting`, when nobody is there. Publishers never wait for one
another, and a `gc` that waits for a long pack keeps nobody out.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diapause.errors import HomeBusy
from diapause.limits import LOCK_S

if TYPE_CHECKING:
    from collections.abc import Iterator


class Gate:
    """One home's gate; within a thread `publishing` may be entered again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._publishers = 0
        self._collecting = False
        self._mine = threading.local()

    @contextmanager
    def publishing(self, bound_s: float = LOCK_S) -> Iterator[None]:
        """No shared file goes while the block runs; raises HomeBusy at the bound."""
        depth = getattr(self._mine, "depth", 0)
        if depth == 0:
            self._enter(bound_s)
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth = depth
            if depth == 0:
                with self._changed:
                    self._publishers -= 1
                    self._changed.notify_all()

    def _enter(self, bound_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: not self._collecting, bound_s):
                raise HomeBusy(verb="gc", waited_s=bound_s)
            self._publishers += 1

    @contextmanager
    def collecting(self, bound_s: float = LOCK_S) -> Iterator[None]:
        """Nobody publishes while the block runs; raises HomeBusy at the bound."""
        assert getattr(self._mine, "depth", 0) == 0, "a publisher can't wait for itself"
        with self._changed:
            free = self._changed.wait_for(
                lambda: not self._publishers and not self._collecting, bound_s
            )
            if not free:
                raise HomeBusy(verb="packing or a check", waited_s=bound_s)
            self._collecting = True
        try:
            yield
        finally:
            with self._changed:
                self._collecting = False
                self._changed.notify_all()
