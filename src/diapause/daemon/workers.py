"""The worker threads that verbs run in.

A verb that began runs to its end, whatever becomes of the client that asked for it. Reads have
threads of their own, so that `ps` answers beside any number of long verbs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread

from diapause import limits

READS_AT_ONCE_MAX = 16


class Workers:
    """Runs engine calls; knows which are under way."""

    def __init__(self) -> None:
        self._verbs = anyio.CapacityLimiter(limits.VERBS_AT_ONCE_MAX)
        self._reads = anyio.CapacityLimiter(READS_AT_ONCE_MAX)
        self._running: set[asyncio.Task[Any]] = set()

    async def verb(self, call: Callable[[], Any]) -> Any:
        """Run a verb; cancelling the caller leaves the verb to run on."""
        task = asyncio.create_task(self._in_thread(call, self._verbs))
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

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

    @staticmethod
    async def _in_thread(call: Callable[[], Any], limiter: anyio.CapacityLimiter) -> Any:
        return await anyio.to_thread.run_sync(call, limiter=limiter)
