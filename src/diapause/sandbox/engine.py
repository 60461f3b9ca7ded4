"""The engine: what one home can do, verb by verb. The daemon calls it from worker threads.

Each verb finds its sandbox, waits for its turn on it, reads the row again under the lock, answers
what is done already, and otherwise runs its steps.
"""

from __future__ import annotations

import contextlib
import secrets
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from diapause.catalog import SandboxRecord, SnapshotRecord, now
from diapause.errors import DiapauseError, SandboxNotFound
from diapause.guest import images
from diapause.guest.build import build_image
from diapause.limits import AGENT_READY_S, PACK_S
from diapause.model import (
    CaptureAnswer,
    CaptureRequest,
    DoctorAnswer,
    ForkAnswer,
    ForkRequest,
    ImageBuildRequest,
    ImageInfo,
    RemoveAnswer,
    ResumeAnswer,
    ResumeRequest,
    RunAnswer,
    RunRequest,
    SandboxDetail,
    SandboxRow,
    SnapshotDetail,
)
from diapause.sandbox import accelerator, admit, doctor, views
from diapause.sandbox.host import Host, row_identity
from diapause.sandbox.pause import Pause, Save
from diapause.sandbox.recovery import is_unsettled, recover, settle
from diapause.sandbox.refer import find_sandbox, find_snapshot, host_name
from diapause.sandbox.remove import Remove
from diapause.sandbox.resume import Boot, Fork, Resume, check_snapshot
from diapause.sandbox.states import require, wrong_state
from diapause.sandbox.verb import new_id

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future
    from pathlib import Path

    from diapause.guest.session import ExecRequest, Session
    from diapause.sandbox.guests import Guest
    from diapause.store.home import Home

_FORKS_AT_ONCE = 4


class Engine:
    """See the module; every method is thread-safe and every failure a DiapauseError."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._catalog = host.catalog

    @property
    def host(self) -> Host:
        """What all verbs of this home share."""
        return self._host

    @classmethod
    def open(cls, home: Home, loop: asyncio.AbstractEventLoop) -> Engine:
        """Open a home, settle what the last daemon left, take up the guests that run."""
        host = Host(home.create(), loop)
        recover(host)
        engine = cls(host)
        for snapshot in host.catalog.snapshots():
            if snapshot.state == "captured":
                engine._pack_behind(snapshot.id)
        return engine

    def close(self) -> None:
        """Let go of everything; guests go on."""
        self._host.close()

    # -- what there is ---------------------------------------------------------------------------

    def doctor(self) -> DoctorAnswer:
        """Prove what this host can do."""
        return doctor.examine(self)

    def build_image(self, request: ImageBuildRequest) -> ImageInfo:
        """Build an image; one that exists stays as it is."""
        flavor = request.flavor or request.name
        return build_image(self._host.home, request.name, flavor, lambda _: None)

    def images(self) -> list[ImageInfo]:
        """All images."""
        return images.list_images(self._host.home)

    def sandboxes(self, everything: bool) -> list[SandboxRow]:
        """The sandboxes that can still run, or everything."""
        return [
            views.sandbox_row(record)
            for record in self._catalog.sandboxes()
            if everything or record.state not in ("stopped", "failed", "removing")
        ]

    def inspect(self, reference: str) -> SandboxDetail:
        """One sandbox."""
        return views.sandbox_detail(self._host, find_sandbox(self._catalog, reference))

    def snapshots(self) -> list[SnapshotDetail]:
        """All snapshots."""
        return [views.snapshot_detail(self._host, row) for row in self._catalog.snapshots()]

    def inspect_snapshot(self, reference: str) -> SnapshotDetail:
        """One snapshot."""
        return views.snapshot_detail(self._host, find_snapshot(self._catalog, reference))

    def console_log(self, reference: str) -> Path:
        """The file that the guest's console is written to."""
        record = find_sandbox(self._catalog, reference)
        return self._host.home.sandbox(record.id) / "console.log"

    # -- run, rm ---------------------------------------------------------------------------------

    def run(self, request: RunRequest) -> RunAnswer:
        """Make a sandbox from an image and boot it."""
        admit.check_run(self._catalog, request)
        image = images.find_image(self._host.home, request.image)
        self._host.driver.program()
        accelerated = accelerator.choose(self._host, image)
        record = self._new_record(request.name, request.image, request.memory_bytes, request.cpus)
        record.disks_bytes = [request.disk_bytes]
        record.identity = row_identity(self._host.driver.identity(accelerated))
        with self._host.locks.hold(record.id):
            self._put_new(record)
            verb = Boot(self._host, record)
            verb.execute()
        return RunAnswer(
            sandbox=record.id, name=record.name, ready_ms=verb.elapsed_ms,
            phases_ms=verb.phases_ms, notes=verb.notes,
        )  # fmt: skip

    def _new_record(
        self, name: str | None, image: str, memory_bytes: int, cpus: int
    ) -> SandboxRecord:
        sandbox = new_id()
        return SandboxRecord(
            id=sandbox, name=name, state="creating", created_at=now(), image=image,
            memory_bytes=memory_bytes, cpus=cpus, disks_bytes=[],
            hostname=host_name(name or f"sandbox-{sandbox[:8]}"), machine_id=secrets.token_hex(16),
        )  # fmt: skip

    def _put_new(self, record: SandboxRecord) -> None:
        admit.check_sandbox_name(self._catalog, record.name)
        self._catalog.put_sandbox(record)

    def remove(self, references: list[str], force: bool) -> RemoveAnswer:
        """Remove sandboxes; one that is gone already is a success that says so."""
        removed: list[str] = []
        already: list[str] = []
        for reference in references:
            try:
                record = find_sandbox(self._catalog, reference)
            except SandboxNotFound:
                if self._catalog.sandbox(reference) is None:
                    raise
                already.append(reference)
                continue
            self._remove_one(record, force)
            removed.append(record.id)
        return RemoveAnswer(removed=removed, already=already)

    def _remove_one(self, record: SandboxRecord, force: bool) -> None:
        with self._host.locks.hold(record.id):
            try:
                record = self._reread(record)
            except DiapauseError:
                if not force:
                    raise
                record = self._catalog.sandbox(record.id) or record  # its VMM is ended all the same
            if record.state == "removed":
                return
            if not force and record.state in ("running", "pausing", "resuming", "creating"):
                raise wrong_state(record, "rm", "paused, stopped or failed; or use `rm -f`")
            Remove(self._host, record).execute()

    # -- pause, save -----------------------------------------------------------------------------

    def pause(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Save everything and free the host's memory."""
        admit.check_snapshot_name(self._catalog, request.name)
        found = find_sandbox(self._catalog, reference)
        with self._host.locks.hold(found.id):
            record = self._reread(found)
            if record.state == "paused":
                return views.paused_already(self._catalog, record)
            require(record, "pause", "running")
            verb = Pause(self._host, record, self._guest(record), request)
            self._capture(verb)
        return self._captured(verb)

    def save(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Take a snapshot of a sandbox that goes on."""
        admit.check_snapshot_name(self._catalog, request.name)
        found = find_sandbox(self._catalog, reference)
        with self._host.locks.hold(found.id):
            verb = self._save(self._reread(found), request)
        return self._captured(verb)

    def _save(self, record: SandboxRecord, request: CaptureRequest) -> Save:
        require(record, "snapshot save", "running")
        verb = Save(self._host, record, self._guest(record), request)
        self._capture(verb)
        return verb

    def _capture(self, verb: Pause | Save) -> None:
        try:
            verb.execute()
        except BaseException:
            if verb.committed and verb.snapshot is not None:
                self._pack_behind(verb.snapshot)  # the snapshot is whole, whatever came after
            raise

    def _captured(self, verb: Pause | Save) -> CaptureAnswer:
        answer = verb.answer()
        packed = self._pack_behind(answer.snapshot)
        if answer.dirty_source == "compared":
            with contextlib.suppress(TimeoutError, CancelledError):  # then it is the upper bound
                packed.result(PACK_S)
            answer.dirty_pages = views.changed_pages(self._catalog, answer)
        return answer

    def _pack_behind(self, snapshot: str) -> Any:
        """Pack, and then, if its sandbox still waits on it, have its flat files ready."""

        def work() -> None:
            try:
                packed = self._host.packer.pack(snapshot)
            except DiapauseError as error:
                self._note_failure(snapshot, error)
                raise
            record = self._catalog.sandbox(packed.sandbox)
            if record and record.state == "paused" and record.snapshot == snapshot:
                self._host.flats.ensure(packed)

        return self._host.behind(f"pack {snapshot}", work)

    def _note_failure(self, snapshot: str, error: DiapauseError) -> None:
        record = self._catalog.snapshot(snapshot)
        if record is not None and record.state == "captured":
            record.error = error.to_dict()
            self._catalog.put_snapshot(record, durable=True)

    # -- resume, fork ----------------------------------------------------------------------------

    def resume(self, reference: str, request: ResumeRequest) -> ResumeAnswer:
        """Bring a paused sandbox back, warm."""
        admit.check_resume(request)
        found = find_sandbox(self._catalog, reference)
        with self._host.locks.hold(found.id):
            record = self._reread(found)
            if record.state == "running":
                return ResumeAnswer(
                    sandbox=record.id, warm=True, ready_ms=0.0, source="local", phases_ms={},
                    snapshot=record.snapshot, already=True,
                )  # fmt: skip
            require(record, "resume", "paused")
            snapshot = self._snapshot_of(record)
            check_snapshot(self._host, snapshot)
            verb = Resume(self._host, record, snapshot)
            verb.execute()
        return ResumeAnswer(
            sandbox=record.id, warm=True, ready_ms=verb.elapsed_ms, source=verb.origin,
            phases_ms=verb.phases_ms, snapshot=snapshot.id, notes=verb.notes,
        )  # fmt: skip

    def fork(self, request: ForkRequest) -> ForkAnswer:
        """New running sandboxes from a snapshot; a running source is saved first and goes on."""
        admit.check_fork(request)
        snapshot, phases = self._fork_source(request.source)
        check_snapshot(self._host, snapshot)
        forks = [self._new_fork(snapshot) for _ in range(request.count)]
        with ThreadPoolExecutor(_FORKS_AT_ONCE, "diapause-fork") as pool:
            outcomes = [pool.submit(self._start_fork, verb) for verb in forks]
        failed = [error for outcome in outcomes if (error := outcome.exception()) is not None]
        if failed:
            self._undo_forks(forks, outcomes)
            raise failed[0]
        for verb in forks:
            phases = {name: max(ms, phases.get(name, 0.0)) for name, ms in verb.phases_ms.items()}
        return ForkAnswer(
            sandboxes=[verb.sandbox for verb in forks], snapshot=snapshot.id, phases_ms=phases,
            notes=sorted({note for verb in forks for note in verb.notes}),
        )  # fmt: skip

    def _fork_source(self, reference: str) -> tuple[SnapshotRecord, dict[str, float]]:
        try:
            found = find_sandbox(self._catalog, reference)
        except SandboxNotFound:
            return find_snapshot(self._catalog, reference), {}
        with self._host.locks.hold(found.id):
            record = self._reread(found)
            if record.state != "running":
                require(record, "fork", "running", "paused", "stopped", "failed")
                return self._snapshot_of(record), {}
            verb = self._save(record, CaptureRequest(durability="process"))
        answer = self._captured(verb)
        return self._snapshot(answer.snapshot), {"save": answer.phases_ms["total"]}

    def _new_fork(self, snapshot: SnapshotRecord) -> Fork:
        record = self._new_record(None, snapshot.image, snapshot.memory_bytes, snapshot.cpus)
        record.disks_bytes, record.identity = list(snapshot.disks_bytes), snapshot.identity
        record.snapshot, record.agent = snapshot.id, snapshot.agent
        return Fork(self._host, record, snapshot)

    def _start_fork(self, verb: Fork) -> None:
        with self._host.locks.hold(verb.sandbox):
            self._put_new(verb.record)
            verb.execute()

    def _undo_forks(self, forks: list[Fork], outcomes: list[Future[None]]) -> None:
        """All of them or none; one that can't be removed keeps no other."""
        for verb, outcome in zip(forks, outcomes, strict=True):
            if outcome.exception() is None:
                with contextlib.suppress(DiapauseError), self._host.locks.hold(verb.sandbox):
                    Remove(self._host, verb.record).execute()

    # -- exec ------------------------------------------------------------------------------------

    async def exec(self, reference: str, request: ExecRequest) -> Session:
        """Start a command in a running sandbox."""
        record = find_sandbox(self._catalog, reference)
        require(record, "exec", "running")
        link = await self._guest(record).answering_link(AGENT_READY_S)
        return await link.exec(request)

    # -- rows ------------------------------------------------------------------------------------

    def _reread(self, record: SandboxRecord) -> SandboxRecord:
        """The row as it is under the lock; what a verb could not finish is settled first."""
        found = self._catalog.sandbox(record.id)
        assert found is not None
        if is_unsettled(self._host, found):
            settle(self._host, found)
            found = self._catalog.sandbox(record.id)
            assert found is not None
        return found

    def _guest(self, record: SandboxRecord) -> Guest:
        guest = self._host.guests.get(record.id)
        if guest is None:
            raise wrong_state(record, "this", "running under this daemon")
        return guest

    def _snapshot(self, snapshot: str) -> SnapshotRecord:
        return find_snapshot(self._catalog, snapshot)

    def _snapshot_of(self, record: SandboxRecord) -> SnapshotRecord:
        if record.snapshot is None:
            raise wrong_state(record, "fork", "running, or to have a snapshot")
        return self._snapshot(record.snapshot)
