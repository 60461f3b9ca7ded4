"""Guests started from a snapshot: resumed, or new ones made."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from diapause.errors import DiapauseError, HostExhausted, SandboxNotFound
from diapause.guest.images import find_image
from diapause.model import CaptureRequest, ForkAnswer, ForkRequest, ResumeAnswer, ResumeRequest
from diapause.operation import carried, shielded
from diapause.sandbox import accelerator, admit
from diapause.sandbox.cold import Cold
from diapause.sandbox.host import row_identity
from diapause.sandbox.network import FORK_HAS_NO_FORWARDS
from diapause.sandbox.part import Part
from diapause.sandbox.refer import find_sandbox, find_snapshot
from diapause.sandbox.remove import remove_later, remove_unasked
from diapause.sandbox.resume import Fork, Resume, check_snapshot
from diapause.sandbox.states import require
from diapause.store.files import no_thread

if TYPE_CHECKING:
    from concurrent.futures import Future

    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.sandbox.captures import Captures
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.starts")
# Nine tenths of a start are work of the VMM and its guest, most of it on one processor. Two of them
# for each fill the waits for the kernel and the disk; more only take caches from each other.
_FORKS_PER_PROCESSOR, _FORKS_AT_ONCE_MIN, _FORKS_AT_ONCE_MAX = 2, 4, 32


class Starts(Part):
    """`resume` and `fork`."""

    def __init__(self, host: Host, captures: Captures) -> None:
        super().__init__(host)
        self.captures = captures

    def resume(self, reference: str, request: ResumeRequest) -> ResumeAnswer:
        """Bring a paused sandbox back, warm."""
        found = find_sandbox(self.catalog, reference)
        with self.host.locks.hold(found.id):
            record = self.reread(found)
            if record.state == "running":
                return ResumeAnswer(
                    sandbox=record.id, warm=True, ready_ms=0.0, source="local", phases_ms={},
                    snapshot=record.snapshot, already=True,
                )  # fmt: skip
            if request.cold:
                return self._cold(record, request)
            require(record, "resume", "paused")
            snapshot = self.snapshot_of(record)
            check_snapshot(self.host, snapshot)
            verb = Resume(self.host, record, snapshot)
            verb.ondemand = self.host.ondemand.wanted(request.memory_mode)
            verb.execute()
        return ResumeAnswer(
            sandbox=record.id, warm=True, ready_ms=verb.elapsed_ms, source=verb.origin,
            phases_ms=verb.phases_ms, snapshot=snapshot.id, notes=verb.notes,
            memory_mode="ondemand" if verb.ondemand else "copy", **verb.fetched(),
        )  # fmt: skip

    def _cold(self, record: SandboxRecord, request: ResumeRequest) -> ResumeAnswer:
        """Boot what ended on its own disk; never taken for what a warm resume is."""
        require(record, "resume --cold", "stopped", "failed")
        admit.check_memory("The sandbox", record.memory_bytes)
        image = find_image(self.host.home, record.image)
        identity = self.host.driver.identity(accelerator.choose(self.host, image))
        record.identity = row_identity(identity)
        verb = Cold(self.host, record)
        verb.ondemand = self.host.ondemand.wanted(request.memory_mode)
        verb.execute()
        return ResumeAnswer(
            sandbox=record.id, warm=False, ready_ms=verb.elapsed_ms, source="local",
            phases_ms=verb.phases_ms, snapshot=record.snapshot, disk=verb.disk, notes=verb.notes,
        )  # fmt: skip

    def fork(self, request: ForkRequest) -> ForkAnswer:
        """New running sandboxes from a snapshot; a running source is saved first and goes on."""
        admit.check_fork(request)
        snapshot, phases = self._fork_source(request.source)
        check_snapshot(self.host, snapshot)
        forks = [self._new_fork(snapshot) for _ in range(request.count)]
        try:
            for outcome in self._start_forks(forks):
                outcome.result(0)  # the pool has ended
        except BaseException:
            with shielded():
                self._undo_forks(forks)
            raise
        for verb in forks:
            phases = {name: max(ms, phases.get(name, 0.0)) for name, ms in verb.phases_ms.items()}
        source = self.catalog.sandbox(snapshot.sandbox)
        network = [FORK_HAS_NO_FORWARDS] if source is not None and source.ports else []
        return ForkAnswer(
            sandboxes=[verb.sandbox for verb in forks], snapshot=snapshot.id, phases_ms=phases,
            notes=sorted({note for verb in forks for note in verb.notes}) + network,
        )  # fmt: skip

    def _fork_source(self, reference: str) -> tuple[SnapshotRecord, dict[str, float]]:
        try:
            found = find_sandbox(self.catalog, reference)
        except SandboxNotFound:
            return find_snapshot(self.catalog, reference), {}
        with self.host.locks.hold(found.id):
            record = self.reread(found)
            if record.state not in ("running", "frozen"):
                require(record, "fork", "running", "paused", "stopped", "failed")
                return self.snapshot_of(record), {}
            verb = self.captures.save_under_lock(record, CaptureRequest(durability="process"))
        answer = self.captures.captured(verb)
        return self.snapshot(answer.snapshot), {"save": answer.phases_ms["total"]}

    def _new_fork(self, snapshot: SnapshotRecord) -> Fork:
        record = self.new_record(None, snapshot.image, snapshot.memory_bytes, snapshot.cpus)
        record.disks_bytes, record.identity = list(snapshot.disks_bytes), snapshot.identity
        record.snapshot, record.agent, record.net = snapshot.id, snapshot.agent, snapshot.net
        record.root_disk = snapshot.root_disk
        return Fork(self.host, record, snapshot)

    def _start_forks(self, forks: list[Fork]) -> list[Future[None]]:
        """What came of each; raises HostExhausted where a thread could not be started.

        What was given to the pool before that, and what the thread was for, may be done all the
        same: none of it is under way any more when this ends, and nobody else knows of it.
        """
        with ThreadPoolExecutor(_forks_at_once(), "diapause-fork") as pool:
            try:
                return [pool.submit(carried(partial(self._start_fork, verb))) for verb in forks]
            except RuntimeError as error:
                pool.shutdown(wait=True, cancel_futures=True)
                if not no_thread(error):
                    raise
                raise HostExhausted(what=f"Starting {len(forks)} forks") from error

    def _start_fork(self, verb: Fork) -> None:
        with self.host.locks.hold(verb.sandbox):
            self.put_new(verb.record)
            verb.execute()

    def _undo_forks(self, forks: list[Fork]) -> None:
        """All of them or none; one that can't be removed now keeps no other, and goes later."""
        for verb in forks:
            try:
                remove_unasked(self.host, verb.sandbox)
            except Exception as error:
                known = isinstance(error, DiapauseError)
                log.warning("fork %s: undoing: %s", verb.sandbox, error, exc_info=not known)
                self.host.watch(partial(remove_later, self.host, verb.sandbox))


def _forks_at_once() -> int:
    wanted = _FORKS_PER_PROCESSOR * len(os.sched_getaffinity(0))
    return min(max(wanted, _FORKS_AT_ONCE_MIN), _FORKS_AT_ONCE_MAX)
