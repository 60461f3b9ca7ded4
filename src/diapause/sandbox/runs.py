"""New sandboxes from an image, and sandboxes that go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diapause.errors import (
    AgentRefused,
    AgentUnreachable,
    BlobDamaged,
    BlobMissing,
    ExecCut,
    SandboxNotFound,
    SnapshotIncompatible,
    SnapshotLost,
    StorageFailed,
    VmmFailed,
    VmmTimeout,
)
from diapause.guest import images
from diapause.model import RemoveAnswer, RunAnswer, RunRequest
from diapause.sandbox import accelerator, admit, ready
from diapause.sandbox.host import row_identity
from diapause.sandbox.network import check_image, parse_forwards
from diapause.sandbox.part import Part
from diapause.sandbox.refer import find_sandbox
from diapause.sandbox.remove import Remove
from diapause.sandbox.resume import Boot, check_snapshot
from diapause.sandbox.states import wrong_state
from diapause.sandbox.warm import FirstRun, WarmRun

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord
    from diapause.sandbox.captures import Captures
    from diapause.sandbox.host import Host

_ALIVE = ("running", "frozen", "pausing", "resuming", "creating")
# A guest that is slow today is no reason to give its ready snapshot up.
_SLOW = (AgentUnreachable, AgentRefused, ExecCut, VmmTimeout)
_NOT_READY = (
    *_SLOW, BlobDamaged, BlobMissing, SnapshotIncompatible, SnapshotLost, StorageFailed, VmmFailed,
)  # fmt: skip


class Runs(Part):
    """`run` and `rm`."""

    def __init__(self, host: Host, captures: Captures) -> None:
        super().__init__(host)
        self._captures, self._making = captures, ready.Making()

    def run(self, request: RunRequest) -> RunAnswer:
        """Make a sandbox from an image: from its ready snapshot, or by booting it."""
        admit.check_run(self.catalog, request)
        image = images.find_image(self.host.home, request.image)
        check_image(request, image)
        admit.check_root_disk(request, image)
        self.host.driver.program()
        record = self._wanted(request, accelerator.choose(self.host, image))
        if request.boot:
            return self._start(Boot(self.host, record))
        name = ready.name_of(self.host, image, record)
        notes: list[str] = []
        if (snapshot := ready.find(self.host, name)) is not None:
            try:
                check_snapshot(self.host, snapshot)
                record.snapshot = snapshot.id
                return self._start(WarmRun(self.host, record, snapshot))
            except _NOT_READY as error:
                notes.append(f"booted: its ready snapshot could not be started: {error.message}")
                if not isinstance(error, _SLOW):
                    ready.set_aside(self.host, snapshot)
                record = self._wanted(request, accelerator.choose(self.host, image))
        answer = self._first(record, name)
        answer.notes += notes
        return answer

    def _first(self, record: SandboxRecord, name: str) -> RunAnswer:
        """Boot; keep a ready snapshot, unless another run is about to, or there is one."""
        with self._making.claim(name) as mine:
            if not mine or self.catalog.snapshot_named(name) is not None:
                return self._start(Boot(self.host, record))
            verb = FirstRun(self.host, record, name)
            try:
                return self._start(verb)
            finally:
                if verb.kept is not None:
                    self._pack(verb.kept)

    def _pack(self, snapshot: str) -> None:
        """Behind the run: pack it, and have flat files there for the next one if it copies."""

        def flat() -> None:
            found = self.catalog.snapshot(snapshot)
            if self.host.ondemand.usual():
                return  # nobody asks for flat files
            if found is not None and found.state == "packed":
                self.host.flats.ensure(found)

        self._captures.pack_behind(snapshot)
        self.host.behind(f"flat {snapshot}", flat)

    def _wanted(self, request: RunRequest, accelerated: str) -> SandboxRecord:
        """The row of what was asked for, under an id of its own each time."""
        record = self.new_record(request.name, request.image, request.memory_bytes, request.cpus)
        record.disks_bytes = [request.disk_bytes]
        image = images.find_image(self.host.home, request.image)
        record.root_disk = image.root_disk_digest
        record.net, record.ports = request.net, parse_forwards(request.ports)
        record.identity = row_identity(self.host.driver.identity(accelerated))
        return record

    def _start(self, verb: Boot | WarmRun) -> RunAnswer:
        with self.host.locks.hold(verb.sandbox):
            with self.host.images:
                images.find_image(self.host.home, verb.record.image)
                self.put_new(verb.record)
            verb.execute()
        record = verb.record
        return RunAnswer(
            sandbox=record.id, name=record.name, ready_ms=verb.elapsed_ms,
            warm=isinstance(verb, WarmRun), phases_ms=verb.phases_ms, notes=verb.notes,
        )  # fmt: skip

    def remove(self, references: list[str], force: bool) -> RemoveAnswer:
        """Remove sandboxes; one that is gone already is a success that says so."""
        removed: list[str] = []
        already: list[str] = []
        for reference in references:
            try:
                record = find_sandbox(self.catalog, reference)
            except SandboxNotFound:
                if self.catalog.sandbox(reference) is None:
                    raise
                already.append(reference)
                continue
            self._remove_one(record, force)
            removed.append(record.id)
        return RemoveAnswer(removed=removed, already=already)

    def _remove_one(self, record: SandboxRecord, force: bool) -> None:
        with self.host.locks.hold(record.id):
            try:
                record = self.reread(record)
            except Exception:
                if not force:
                    raise
                record = self.catalog.sandbox(record.id) or record  # its VMM is ended all the same
            if record.state == "removed":
                return
            if not force and record.state in _ALIVE:
                raise wrong_state(record, "rm", "paused, stopped or failed; or use `rm -f`")
            with self.host.reserve.room():
                Remove(self.host, record).execute()
