"""What the daemon holds while it runs: its home, its engine once that is open, its workers.

The socket answers before the engine is open. A request waits for it, bounded; where opening failed
every request is answered with that failure, typed, so the client can say why.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from diapause import limits
from diapause.daemon.engine_api import Engine, OpenEngine
from diapause.daemon.operations import Operations
from diapause.daemon.workers import Workers
from diapause.errors import DaemonUnreachable, DiapauseError
from diapause.store.files import unexpected_storage_error
from diapause.store.home import Home

log = logging.getLogger("diapause.daemon")


@dataclass
class State:
    """One daemon's life."""

    home: Home
    open_engine: OpenEngine
    workers: Workers = field(default_factory=Workers)
    operations: Operations = field(default_factory=Operations)
    failure: DiapauseError | None = None
    streams: int = 0
    _engine: Engine | None = None
    _opened: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ready(self) -> bool:
        """Whether the engine is open."""
        return self._engine is not None

    async def open(self) -> None:
        """Open the engine; a failure is kept for whoever asks."""
        loop = asyncio.get_running_loop()
        try:
            self._engine = await self.workers.read(lambda: self.open_engine(self.home, loop))
        except DiapauseError as error:
            self.failure = error
        except Exception as error:
            log.exception("opening %s failed", self.home.root)
            refused = unexpected_storage_error("The home", self.home.root, error)
            self.failure = refused or DiapauseError(cause=f"{type(error).__name__}: {error}")
        self._opened.set()

    async def engine(self) -> Engine:
        """The engine; raises why there is none."""
        try:
            await asyncio.wait_for(self._opened.wait(), limits.LOCK_S)
        except TimeoutError as error:
            cause = f"it has been recovering for {limits.LOCK_S:.0f} s"
            raise DaemonUnreachable(home=self.home.root, cause=cause) from error
        if self._engine is None:
            raise self.failure or DiapauseError(cause="the engine did not open")
        return self._engine

    async def close(self, bound_s: float) -> bool:
        """Close the engine once no verb runs; False where one still does, or the bound is reached.

        What an engine waits for when it closes, packing above all, may take longer than anybody
        wants to wait for a daemon to end.
        """
        if left := await self.workers.drain(0):
            log.warning("leaving while %d verbs run", left)
            return False
        if self._engine is None:
            return True
        closing = asyncio.create_task(self.workers.read(self._engine.close))
        done, _ = await asyncio.wait({closing}, timeout=bound_s)
        if not done:
            log.warning("leaving while the engine closes, after %.0f s", bound_s)
            return False
        closing.result()
        return True
