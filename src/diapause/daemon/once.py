"""Idempotency keys: a request that is repeated is done once and answered the same.

The key is journaled with the digest of what is asked and the operation that does it, before that
operation's first step. Whoever brings the key again, with the same request,

- while it is under way, waits for it and gets what it comes to;
- after it was done, gets its answer;
- after its daemon died, gets the answer where the thing was made, and otherwise it is made now;
- after it failed or was cancelled, begins it anew: nothing had been made.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from typing import TYPE_CHECKING, Any

import msgspec

from diapause import limits, operation
from diapause.errors import DaemonUnreachable, DiapauseError, InvalidRequest, KeyReused
from diapause.store.boot import boot_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from diapause.daemon.engine_api import Engine
    from diapause.daemon.operations import Asked
    from diapause.daemon.routes import Call, Route
    from diapause.daemon.state import State
    from diapause.journal import KeptRequest

log = logging.getLogger("diapause.daemon")

_KEY = re.compile(r"[!-~]+")


def check_key(key: str) -> None:
    """Refuse a key that is empty, too long, or not plain printable text."""
    if len(key) > limits.IDEMPOTENCY_KEY_LENGTH_MAX or not _KEY.fullmatch(key):
        cause = f"it is 1 to {limits.IDEMPOTENCY_KEY_LENGTH_MAX} printable characters, no spaces"
        raise InvalidRequest(what="the header Idempotency-Key", cause=cause)


def digest(route: Route, call: Call) -> str:
    """Of what is asked: the same for the same request, however it was written."""
    asked = [route.operation, call.ref, sorted(call.flags.items()), call.body]
    return hashlib.blake2b(msgspec.json.encode(asked), digest_size=32).hexdigest()


class Once:
    """One request under a key."""

    def __init__(
        self, state: State, engine: Engine, asked: Asked, key: str, route: Route, call: Call
    ) -> None:
        self._state, self._engine, self._asked = state, engine, asked
        self._key, self._digest, self._call = key, digest(route, call), call

    async def perform(self, work: Callable[[], Any]) -> bytes:
        """The encoded answer, of `work` or of whoever did the same before."""
        mine = self._asked.operation.id
        while True:
            kept = await self._read(
                lambda: self._engine.journal.keep_request(self._key, self._digest, mine, boot_id())
            )
            if kept is None:
                return await self._do(work)
            if kept.digest != self._digest:
                raise KeyReused(key=self._key)
            if kept.answer is not None:
                return bytes(kept.answer)
            other = self._state.operations.under_way(kept.operation)
            if other is not None:
                return await self._wait(other)
            await self._take_up(kept)

    async def _wait(self, other: Asked) -> bytes:
        bound_s = limits.PACK_S + limits.LOCK_S
        try:
            return await asyncio.wait_for(asyncio.shield(other.outcome), bound_s)
        except TimeoutError as error:
            cause = f"the same request has been under way for {bound_s:.0f} s"
            raise DaemonUnreachable(home=self._state.home.root, cause=cause) from error

    async def _take_up(self, kept: KeptRequest) -> None:
        """Of a daemon that died: answered where the thing is there, else free to be begun."""
        journal = self._engine.journal

        def settle() -> None:
            made = self._engine.made_by(kept.operation, self._call.body)
            if made is None:
                journal.forget_request(self._key, kept.operation)
            else:
                journal.answer_request(self._key, kept.operation, msgspec.json.encode(made))

        await self._state.workers.thread(operation.carried(settle), self._call.ref)

    async def _do(self, work: Callable[[], Any]) -> bytes:
        journal, mine = self._engine.journal, self._asked.operation.id

        def run() -> bytes:
            try:
                encoded = msgspec.json.encode(work())
            except BaseException:
                journal.forget_request(self._key, mine)
                raise
            try:
                journal.answer_request(self._key, mine, encoded)
            except DiapauseError as error:  # it is made, and found by its operation if asked again
                log.warning("the answer of %s is not kept: %s", mine, error)
            return encoded

        done: bytes = await self._state.workers.thread(run, self._call.line)
        return done

    async def _read(self, call: Callable[[], KeptRequest | None]) -> KeptRequest | None:
        found: KeptRequest | None = await self._state.workers.read(call)
        return found
