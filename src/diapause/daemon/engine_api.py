"""The engine as the daemon sees it: the seam between HTTP and the verbs.

Every synchronous method is thread-safe, bounded in time, and runs in a worker thread; only `exec`
is awaited in the event loop, since a stream lives there. Every failure is a `DiapauseError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

from diapause.guest.session import ExecRequest
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


class Session(Protocol):
    """A command that runs in a guest.

    Iterating yields objects with `stream` (1 or 2) and `data`, and last one with `code`; it raises
    `ExecCut` where the stream ended before that. `write` returns when there is room for more.
    """

    async def write(self, data: bytes) -> None:
        """Hand on input; returns when there is room for more."""

    async def end_input(self) -> None:
        """Say that the input ends here."""

    async def signal(self, number: int) -> None:
        """Send the command a signal."""

    async def resize(self, rows: int, cols: int) -> None:
        """Tell the command's terminal its size."""

    def abandon(self) -> None:
        """Stop caring: what the command still writes is discarded."""

    def __aiter__(self) -> AsyncIterator[Any]: ...


class Engine(Protocol):
    """What one home can do."""

    @property
    def journal(self) -> Journal:
        """What happened and is under way; what idempotency keys stand for."""

    def made_by(self, operation: str, request: object) -> Answer | None:
        """The answer of what a daemon that died made for a request; None where it made nothing."""

    def close(self) -> None:
        """Let go of everything; guests go on."""

    def doctor(self) -> DoctorAnswer:
        """Prove what this host can do."""

    def bench(self, request: BenchRequest) -> BenchAnswer:
        """Measure what this host does."""

    def build_image(self, request: ImageBuildRequest) -> ImageInfo:
        """Build an image, or find that it exists."""

    def import_image(self, request: ImageImportRequest) -> ImageInfo:
        """Make an image of files on this host."""

    def images(self) -> list[ImageInfo]:
        """All images."""

    def inspect_image(self, name: str) -> ImageDetail:
        """One image, and who needs it."""

    def remove_image(self, name: str) -> RemoveImageAnswer:
        """Remove an image that nobody needs."""

    def run(self, request: RunRequest) -> RunAnswer:
        """Make a sandbox and start it."""

    def sandboxes(self, everything: bool) -> list[SandboxRow]:
        """All but stopped, failed and half-removed ones, or `everything`."""

    def inspect(self, reference: str) -> SandboxDetail:
        """One sandbox."""

    def remove(self, references: list[str], force: bool) -> RemoveAnswer:
        """Remove sandboxes; one that is gone already is a success."""

    def pause(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Save everything and free the memory."""

    def save(self, reference: str, request: CaptureRequest) -> CaptureAnswer:
        """Take a snapshot of a sandbox that goes on."""

    def freeze(self, reference: str) -> FreezeAnswer:
        """Stop the vCPUs of a running guest; its memory stays."""

    def thaw(self, reference: str) -> FreezeAnswer:
        """Let a frozen guest go on."""

    def resume(self, reference: str, request: ResumeRequest) -> ResumeAnswer:
        """Bring a paused sandbox back."""

    def restore(self, reference: str, request: RestoreRequest) -> RestoreAnswer:
        """Put a sandbox back to a snapshot."""

    def fork(self, request: ForkRequest) -> ForkAnswer:
        """Make new sandboxes from a sandbox or a snapshot."""

    def snapshots(self) -> list[SnapshotDetail]:
        """All snapshots."""

    def inspect_snapshot(self, reference: str) -> SnapshotDetail:
        """One snapshot."""

    def remove_snapshot(self, reference: str) -> RemoveSnapshotAnswer:
        """Remove a snapshot; its files stay until gc."""

    def gc(self, request: GcRequest) -> GcAnswer:
        """Delete what nothing refers to."""

    def check(self, request: CheckRequest) -> CheckAnswer:
        """Read everything, and with `repair` make again what can be."""

    def verify_snapshot(self, reference: str) -> CheckAnswer:
        """Read all that one snapshot is made of."""

    def df(self) -> DfAnswer:
        """What takes the space of the home."""

    def pager(self) -> PagerAnswer:
        """The processes that serve memory on demand."""

    def diff_snapshots(self, old: str, new: str) -> DiffAnswer:
        """What differs between two snapshots."""

    def console_log(self, reference: str) -> Path:
        """The file that the guest's console is written to."""

    def events(self, after: int, limit: int) -> list[Event]:
        """At most `limit` events after that number, oldest first."""

    def metrics(self) -> bytes:
        """What was counted and measured, as Prometheus reads it."""

    async def exec(self, reference: str, request: ExecRequest) -> Session:
        """Start a command in a running sandbox."""

    async def console(self, reference: str) -> Session:
        """The console of a running sandbox, for one client at a time."""


# Opens a home in a worker thread at start: recovers what a killed daemon left and adopts the
# guests that run. `Engine.open` in the product.
OpenEngine = Callable[[Home, asyncio.AbstractEventLoop], Engine]
