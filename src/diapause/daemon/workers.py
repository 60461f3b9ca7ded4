"""The worker threads that verbs run in.

A verb that began runs to its end, whatever becomes of the client that asked for it. Reads have
threads of their own, so that `ps` answers beside any number of long verbs. Of one sandbox only a
few verbs have a thread; the others wait outside, in the order in which they came, so that a sandbox
that is stuck can't take the threads of all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from diapause import limits, operation
from diapause.errors import Busy

T = TypeVar("T")

READS_AT_ONCE_MAX = 16
_WAIT_OUTSIDE_MAX = limits.LOCK_WAITERS_MAX - limits.VERBS_OF_ONE_SANDBOX_MAX + 1


class Workers:
    """Runs engine calls; knows which are under way."""

    def __init__(self) -> None:
        self._verbs = anyio.CapacityLimiter(limits.VERBS_AT_ONCE_MAX)
        self._reads = anyio.CapacityLimiter(READS_AT_ONCE_MAX)
        self._lines: dict[str, anyio.CapacityLimiter] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def verb(self, work: Coroutine[Any, Any, T]) -> T:
        """Run what a client asked for; cancelling the caller leaves it to run on."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    async def thread(self, call: Callable[[], Any], line: str = "") -> Any:
        """Run a part of a verb in a thread, after those before it in the same line.

        Raises Busy where the line is too long or does not move, Cancelled where the operation is.
        """
        async with self._turn(line):
            return await self._in_thread(call, self._verbs)

    async def read(self, call: Callable[[], Any]) -> Any:
        """Run something that changes nothing."""
        return await self._in_thread(call, self._reads)

    async def drain(self, bound_s: float) -> int:
        """Wait for the verbs under way; how many were left when the bound was reached."""
        if self._running:
            await asyncio.wait(self._running, timeout=bound_s)
        return len(self._running)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Looked at, so that a failure nobody waits for any more is not reported a second time.
        if not task.cancelled():
            task.exception()

    @asynccontextmanager
    async def _turn(self, line: str) -> AsyncIterator[None]:
        if not line:
            yield
            return
        limiter = self._lines.setdefault(
            line, anyio.CapacityLimiter(limits.VERBS_OF_ONE_SANDBOX_MAX)
        )
        waiting = limiter.statistics().tasks_waiting
        if waiting >= _WAIT_OUTSIDE_MAX:
            raise Busy(sandbox=line, cause=f"{waiting} others wait for it already")
        await self._acquire(line, limiter)
        try:
            yield
        finally:
            limiter.release()
            found = limiter.statistics()
            if not found.borrowed_tokens and not found.tasks_waiting:
                self._lines.pop(line, None)

    async def _acquire(self, line: str, limiter: anyio.CapacityLimiter) -> None:
        with anyio.move_on_after(limits.LOCK_S) as scope:
            asked, loop = operation.current(), asyncio.get_running_loop()
            if asked is None:
                await limiter.acquire()
                return
            operation.at_step("waiting for its turn")
            with asked.waking(lambda: loop.call_soon_threadsafe(scope.cancel)):
                await limiter.acquire()
            return
        operation.checkpoint()
        raise Busy(sandbox=line, cause=f"it was at other verbs for {limits.LOCK_S:.0f} s")

    @staticmethod
    async def _in_thread(call: Callable[[], Any], limiter: anyio.CapacityLimiter) -> Any:
        return await anyio.to_thread.run_sync(call, limiter=limiter)
