"""One verb at a time on a sandbox; others wait their turn, in the order in which they came.

- First come, first served: the lock is handed to the first in the line, so nobody overtakes.
- A line is bounded (`LOCK_WAITERS_MAX`), and so is each wait: beyond either it is Busy.
- A wait ends at once where its operation is cancelled.
- Whoever holds a sandbox may take it again in the same thread.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diapause import operation
from diapause.errors import Busy
from diapause.limits import LOCK_S, LOCK_WAITERS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Line:
    """Who holds a sandbox, how often, and who comes next."""

    def __init__(self) -> None:
        self.holder: int | None = None
        self.depth = 0
        self.waiting: deque[_Turn] = deque()


class _Turn:
    """A place in a line; `mine` is set by whoever hands the lock over."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.woken = threading.Event()
        self.mine = False


class SandboxLocks:
    """A lock for each sandbox of the home."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._lines: dict[str, _Line] = {}

    @contextmanager
    def hold(self, sandbox: str, bound_s: float = LOCK_S) -> Iterator[None]:
        """Hold the sandbox for the block; raises Busy at the bound, Cancelled when cancelled."""
        self._take(sandbox, bound_s)
        try:
            yield
        finally:
            self._release(sandbox)

    def waiting(self, sandbox: str) -> int:
        """How many wait for their turn."""
        with self._guard:
            line = self._lines.get(sandbox)
            return len(line.waiting) if line is not None else 0

    def _take(self, sandbox: str, bound_s: float) -> None:
        me = threading.get_ident()
        with self._guard:
            line = self._lines.setdefault(sandbox, _Line())
            if line.holder in (None, me):
                line.holder, line.depth = me, line.depth + 1
                return
            if len(line.waiting) >= LOCK_WAITERS_MAX:
                cause = f"{len(line.waiting)} others wait for it already"
                raise Busy(sandbox=sandbox, cause=cause)
            turn = _Turn()
            line.waiting.append(turn)
        self._wait(sandbox, line, turn, bound_s)

    def _wait(self, sandbox: str, line: _Line, turn: _Turn, bound_s: float) -> None:
        cancellable = operation.cancellable()
        if cancellable is None:
            turn.woken.wait(bound_s)
        else:
            operation.at_step("waiting for its turn")
            with cancellable.waking(turn.woken.set):
                turn.woken.wait(bound_s)
        with self._guard:
            if not turn.mine:
                line.waiting.remove(turn)
        if turn.mine and (cancellable is None or not cancellable.cancelled):
            return
        if turn.mine:
            self._release(sandbox)
        operation.checkpoint()
        raise Busy(sandbox=sandbox, cause=f"it was at another verb for {bound_s:.0f} s")

    def _release(self, sandbox: str) -> None:
        with self._guard:
            line = self._lines[sandbox]
            line.depth -= 1
            if line.depth:
                return
            if not line.waiting:
                del self._lines[sandbox]
                return
            turn = line.waiting.popleft()
            line.holder, line.depth, turn.mine = turn.thread, 1, True
            turn.woken.set()
