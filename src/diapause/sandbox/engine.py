"""The engine: what one home can do, verb by verb. The daemon calls it from worker threads.

The work is in its parts: `runs`, `captures`, `starts`, `freezes`, `restores`.

Each verb finds its sandbox, waits for its turn on it, reads the row again under the lock, answers
what is done already, and otherwise runs its steps.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from diapause import __version__
from diapause.guest import images
from diapause.guest.build import build_image
from diapause.guest.imports import import_image
from diapause.limits import AGENT_READY_S
from diapause.operation import at_step
from diapause.sandbox import doctor, once, views
from diapause.sandbox.bench import run as bench
from diapause.sandbox.captures import Captures
from diapause.sandbox.consoles import Rotation
from diapause.sandbox.freezes import Freezes
from diapause.sandbox.host import Host
from diapause.sandbox.pager_view import pager_answer
from diapause.sandbox.ready import is_ready
from diapause.sandbox.recovery import recover
from diapause.sandbox.refer import find_sandbox, find_snapshot
from diapause.sandbox.restores import Restores
from diapause.sandbox.runs import Runs
from diapause.sandbox.starts import Starts
from diapause.sandbox.states import require
from diapause.sandbox.upkeep.upkeep import Upkeep

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from diapause.guest.console import ConsoleSession
    from diapause.guest.session import ExecRequest, Session
    from diapause.journal import Journal
    from diapause.model import (
        Answer,
        BenchAnswer,
        BenchRequest,
        CaptureAnswer,
        CaptureRequest,
        CheckAnswer,
        CheckRequest,
        DfAnswer,
        DiffAnswer,
        DoctorAnswer,
        Event,
        ForkAnswer,
        ForkRequest,
        FreezeAnswer,
        GcAnswer,
        GcRequest,
        ImageBuildRequest,
        ImageDetail,
        ImageImportRequest,
        ImageInfo,
        PagerAnswer,
        RemoveAnswer,
        RemoveImageAnswer,
        RemoveSnapshotAnswer,
        RestoreAnswer,
        RestoreRequest,
        ResumeAnswer,
        ResumeRequest,
        RunAnswer,
        RunRequest,
        SandboxDetail,
        SandboxRow,
        SnapshotDetail,
    )
    from diapause.store.home import Home


class Engine:
    """See the module; every method is thread-safe and every failure a DiapauseError."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._catalog = host.catalog
        self._captures = Captures(host)
        self._runs = Runs(host, self._captures)
        self._starts = Starts(host, self._captures)
        self._freezes = Freezes(host)
        self._upkeep = Upkeep(host)
        self._rotation = Rotation(host)
        self._restores = Restores(host, self._captures)

    @property
    def host(self) -> Host:
        """What all verbs of this home share."""
        return self._host

    @property
    def journal(self) -> Journal:
        """What happened and is under way; what idempotency keys stand for."""
        return self._catalog.journal

    def made_by(self, operation: str, request: object) -> Answer | None:
        """The answer of what a daemon that died made for a request; None where it made nothing."""
        return once.made_by(self._host, operation, request)

    @classmethod
    def open(cls, home: Home, loop: asyncio.AbstractEventLoop) -> Engine:
        """Open a home, settle what the last daemon left, take up the guests that run."""
        host = Host(home.create(), loop)
        with host.reserve.room():  # a full disk keeps nobody from opening a home
            recover(host)
        host.catalog.worked()
        host.reserve.make()
        engine = cls(host)
        host.event("daemon_started", version=__version__, pid=os.getpid())
        for snapshot in host.catalog.snapshots(removed=True):
            if snapshot.state == "captured":
                engine._captures.pack_behind(snapshot.id)
        return engine

    def close(self) -> None:
        """Let go of everything; guests go on."""
        self._rotation.close()
        self._host.close()

    # -- what there is ---------------------------------------------------------------------------

    def doctor(self) -> DoctorAnswer:
        """Prove what this host can do."""
        return doctor.examine(self)

    def bench(self, request: BenchRequest) -> BenchAnswer:
        """Measure what this host does."""
        return bench.measure(self, request)

    def build_image(self, request: ImageBuildRequest) -> ImageInfo:
        """Build an image; one that exists stays as it is."""
        flavor = request.flavor or request.name
        return build_image(self._host.home, request.name, flavor, at_step)

    def import_image(self, request: ImageImportRequest) -> ImageInfo:
        """Make an image of files on this host."""
        return import_image(self._host.home, request, at_step)

    def images(self) -> list[ImageInfo]:
        """All images."""
        return images.list_images(self._host.home)

    def sandboxes(self, everything: bool) -> list[SandboxRow]:
        """The sandboxes that can still run, or everything."""
        records = [
            record
            for record in self._catalog.sandboxes()
            if everything or record.state not in ("stopped", "failed", "removing")
        ]
        return views.sandbox_rows(self._host, records)

    def inspect(self, reference: str) -> SandboxDetail:
        """One sandbox."""
        return views.sandbox_detail(self._host, find_sandbox(self._catalog, reference))

    def snapshots(self) -> list[SnapshotDetail]:
        """All snapshots but those that are kept to start images from."""
        rows = [row for row in self._catalog.snapshots() if not is_ready(row)]
        return [views.snapshot_detail(self._host, row) for row in rows]

    def inspect_snapshot(self, reference: str) -> SnapshotDetail:
        """One snapshot."""
        return views.snapshot_detail(self._host, find_snapshot(self._catalog, reference))

    def console_log(self, reference: str) -> Path:
        """The file that the guest's console is written to."""
        record = find_sandbox(self._catalog, reference)
        return self._host.home.sandbox(record.id) / "console.log"

    def events(self, after: int, limit: int) -> list[Event]:
        """At most `limit` events after that number, oldest first."""
        return self._catalog.journal.events(after, limit)

    def metrics(self) -> bytes:
        """What was counted and measured, as Prometheus reads it."""
        return self._host.metrics.text()

    # -- verbs -----------------------------------------------------------------------------------

    def run(self, request: RunRequest) -> RunAnswer:
        """Make a sandbox from an image and boot it."""
        return self._runs.run(request)

    def remove(self, references: list[str], force: bool) -> RemoveAnswer:
        """Remove sandboxes; one that is gone already is a success that says so."""
        return self._runs.remove(references, force)

    def pause(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Save everything and free the host's memory."""
        return self._captures.pause(reference, request)

    def save(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Take a snapshot of a sandbox that goes on."""
        return self._captures.save(reference, request)

    def freeze(self, reference: str) -> FreezeAnswer:
        """Stop the vCPUs of a running guest; its memory stays."""
        return self._freezes.freeze(reference)

    def thaw(self, reference: str) -> FreezeAnswer:
        """Let a frozen guest go on, with its clock set."""
        return self._freezes.thaw(reference)

    def resume(self, reference: str, request: ResumeRequest) -> ResumeAnswer:
        """Bring a paused sandbox back, warm; boot one that ended, when asked for that."""
        return self._starts.resume(reference, request)

    def restore(self, reference: str, request: RestoreRequest) -> RestoreAnswer:
        """Put a sandbox back to a snapshot; its present state is saved first."""
        return self._restores.restore(reference, request)

    def fork(self, request: ForkRequest) -> ForkAnswer:
        """New running sandboxes from a snapshot; a running source is saved first and goes on."""
        return self._starts.fork(request)

    # -- upkeep ----------------------------------------------------------------------------------

    def remove_snapshot(self, reference: str) -> RemoveSnapshotAnswer:
        """Remove a snapshot; its files stay until gc."""
        return self._upkeep.remove_snapshot(reference)

    def inspect_image(self, name: str) -> ImageDetail:
        """One image, and who needs it."""
        return self._upkeep.inspect_image(name)

    def remove_image(self, name: str) -> RemoveImageAnswer:
        """Remove an image that nobody needs."""
        return self._upkeep.remove_image(name)

    def gc(self, request: GcRequest) -> GcAnswer:
        """Delete what nothing refers to."""
        return self._upkeep.gc(request)

    def check(self, request: CheckRequest) -> CheckAnswer:
        """Read everything, and with `repair` make again what can be."""
        return self._upkeep.check(request)

    def verify_snapshot(self, reference: str) -> CheckAnswer:
        """Read all that one snapshot is made of."""
        return self._upkeep.verify(reference)

    def df(self) -> DfAnswer:
        """What takes the space of the home."""
        return self._upkeep.df()

    def pager(self) -> PagerAnswer:
        """The processes that serve memory on demand."""
        return pager_answer(self.host.ondemand.pager)

    def diff_snapshots(self, old: str, new: str) -> DiffAnswer:
        """What differs between two snapshots."""
        return self._upkeep.diff(old, new)

    # -- exec ------------------------------------------------------------------------------------

    async def exec(self, reference: str, request: ExecRequest) -> Session:
        """Start a command in a running sandbox."""
        record = find_sandbox(self._catalog, reference)
        require(record, "exec", "running")
        link = await self._runs.guest(record).answering_link(AGENT_READY_S)
        return await link.exec(request)

    async def console(self, reference: str) -> ConsoleSession:
        """The console of a running sandbox, for one client at a time."""
        record = find_sandbox(self._catalog, reference)
        require(record, "console", "running")
        return await self._runs.guest(record).open_console()
