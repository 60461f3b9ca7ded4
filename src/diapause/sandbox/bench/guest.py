"""The guests that are measured: verbs of a scratch home's engine, and commands in them."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diapause import operation
from diapause.errors import AgentUnreachable, BenchFailed, Cancelled
from diapause.guest.session import ExecRequest, Exit
from diapause.limits import BENCH_WORK_S, PACK_S
from diapause.model import CaptureRequest, GcRequest, ResumeRequest, RunRequest
from diapause.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diapause.catalog import SnapshotRecord
    from diapause.model import CaptureAnswer, ResumeAnswer, RunAnswer
    from diapause.sandbox.engine import Engine

IMAGE = "tiny"
_LOOK_EVERY_S = 0.01
_DISK_BYTES = 64 * MIB


@contextmanager
def apart(step: str) -> Iterator[None]:
    """Say what is measured, and keep what the verbs of the block say of themselves to themselves.

    Whoever cancels the operation cancels them.
    """
    operation.at_step(step)
    outer = operation.current()
    if outer is None:
        yield
        return
    inner = operation.Operation(outer.verb, outer.id)
    with outer.waking(inner.cancel), operation.under(inner):
        yield


def timed_ms(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


@dataclass
class Subject:
    """One guest of a scratch home."""

    engine: Engine
    sandbox: str
    ran: RunAnswer

    @classmethod
    def boot(cls, engine: Engine, memory_bytes: int) -> Subject:
        """A fresh one, booted."""
        request = RunRequest(
            image=IMAGE, memory_bytes=memory_bytes, disk_bytes=_DISK_BYTES, boot=True
        )
        ran = engine.run(request)
        return cls(engine, ran.sandbox, ran)

    def remove(self) -> None:
        """End it."""
        self.engine.remove([self.sandbox], force=True)

    def sh(self, command: str) -> None:
        """Run a shell command; its end is awaited, what it writes is not kept.

        Raises BenchFailed; AgentUnreachable where it takes too long.
        """
        work = asyncio.wait_for(self._sh(command), BENCH_WORK_S)
        future = asyncio.run_coroutine_threadsafe(work, self.engine.host.loop)
        try:
            code = operation.wait_for(future, 2 * BENCH_WORK_S)
        except TimeoutError as error:
            future.cancel()
            raise AgentUnreachable(sandbox=self.sandbox, bound_s=BENCH_WORK_S) from error
        except Cancelled:
            future.cancel()
            raise
        if code != 0:
            raise BenchFailed(what="a guest", cause=f"`{command}` ended with {code}")

    async def _sh(self, command: str) -> int:
        request = ExecRequest(argv=["sh", "-c", command], stdin=False)
        session = await self.engine.exec(self.sandbox, request)
        try:
            async for piece in session:
                if isinstance(piece, Exit):
                    return piece.code
        finally:
            session.abandon()
        return 0

    def save(self) -> CaptureAnswer:
        """A snapshot, packed when this returns: packing disturbs nothing that follows."""
        return self._packed(self.engine.save(self.sandbox, CaptureRequest(durability="process")))

    def pause(self) -> CaptureAnswer:
        """A pause, packed when this returns."""
        return self._packed(self.engine.pause(self.sandbox, CaptureRequest(durability="process")))

    def resume(self, how: Literal["ondemand", "passed", "copy"]) -> ResumeAnswer:
        """Resume; what is to be copied or passed through lies in a flat file already.

        On demand there is none: what is passed through is not the pager's doing.
        """
        flats = self.engine.host.flats
        if how == "ondemand":
            flats.drop(self.snapshot().id)
        else:
            flats.ensure(self.snapshot())
        mode: Literal["ondemand", "copy"] = "copy" if how == "copy" else "ondemand"
        return self.engine.resume(self.sandbox, ResumeRequest(memory_mode=mode))

    def snapshot(self) -> SnapshotRecord:
        """The one that it stands on."""
        record = self.engine.host.catalog.sandbox(self.sandbox)
        found = record and record.snapshot and self.engine.host.catalog.snapshot(record.snapshot)
        assert found, "it was captured"
        return found

    def forget_older(self) -> None:
        """Free what earlier rounds took: nothing grows with their number."""
        now = self.snapshot().id
        for row in self.engine.host.catalog.snapshots():
            if row.id != now:
                self.engine.remove_snapshot(row.id)
        self.engine.gc(GcRequest())

    def _packed(self, answer: CaptureAnswer) -> CaptureAnswer:
        deadline = time.monotonic() + PACK_S
        while time.monotonic() < deadline:
            operation.checkpoint()
            row = self.engine.host.catalog.snapshot(answer.snapshot)
            if row is None or row.state != "captured":
                break
            time.sleep(_LOOK_EVERY_S)
        return answer
