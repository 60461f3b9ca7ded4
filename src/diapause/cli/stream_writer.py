"""A thread that writes one of our output streams, behind a bounded queue.

The queue is bounded by whoever fills it looking at `has_room` first. After a failure everything is
discarded: the failure is told once, and the command decides how it ends.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from diapause.units import MIB

# Below this there is room; what one read of the socket holds comes on top of it.
ROOM_BYTES = 1 * MIB


class StreamWriter:
    """Writes to one file descriptor; `wake` is called when there is room again or a failure."""

    def __init__(self, descriptor: int, wake: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._wake = wake
        self._parts: deque[memoryview] = deque()
        self._size = 0
        self._ending = False
        self._failure: OSError | None = None
        self._failed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def has_room(self) -> bool:
        """Whether more should be put."""
        return self._size < ROOM_BYTES

    def put(self, data: memoryview) -> None:
        """Add data; never blocks."""
        if self._failed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, daemon=True)
            self._thread.start()
        with self._changed:
            self._parts.append(data)
            self._size += len(data)
            self._changed.notify()

    def finish(self) -> None:
        """Wait until everything is written, for as long as its reader takes."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def take_failure(self) -> OSError | None:
        """Why writing failed, the first time this is asked after it did."""
        failure, self._failure = self._failure, None
        return failure

    def _write_all(self) -> None:
        while (part := self._next()) is not None:
            try:
                self._write(part)
            except OSError as error:
                self._fail(error)
                return

    def _next(self) -> memoryview | None:
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._ending)
            return self._parts.popleft() if self._parts else None

    def _write(self, part: memoryview) -> None:
        left = part
        while left:
            left = left[os.write(self._descriptor, left) :]
        with self._changed:
            had_room = self.has_room
            self._size -= len(part)
        if not had_room and self.has_room:
            self._wake()

    def _fail(self, error: OSError) -> None:
        with self._changed:
            self._failure, self._failed = error, True
            self._parts.clear()
            self._size = 0
        self._wake()
