"""Sandboxes put back to a snapshot."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from diapause import operation
from diapause.errors import Cancelled, DiapauseError, RestoreFailed, SnapshotIncompatible
from diapause.model import CaptureRequest, RestoreAnswer, RestoreRequest
from diapause.sandbox.part import Part
from diapause.sandbox.pause import Pause
from diapause.sandbox.refer import find_sandbox
from diapause.sandbox.restore import Restore
from diapause.sandbox.resume import Resume, check_snapshot
from diapause.sandbox.states import require, wrong_state

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord, SnapshotRecord
    from diapause.model import SandboxState
    from diapause.sandbox.captures import Captures
    from diapause.sandbox.host import Host


class Restores(Part):
    """`restore`."""

    def __init__(self, host: Host, captures: Captures) -> None:
        super().__init__(host)
        self.captures = captures

    def restore(self, reference: str, request: RestoreRequest) -> RestoreAnswer:
        """Put a sandbox back to a snapshot; one that ran runs again, from there."""
        found = find_sandbox(self.catalog, reference)
        target = self.snapshot(request.snapshot)
        with self.host.locks.hold(found.id):
            record = self.reread(found)
            require(record, "restore", "running", "frozen", "paused", "stopped", "failed")
            check_snapshot(self.host, target)
            _check_shape(self.host, record, target)
            if record.state == "paused" and record.snapshot == target.id:
                return RestoreAnswer(
                    sandbox=record.id, snapshot=target.id, saved=target.id, state="paused",
                    phases_ms={}, already=True,
                )  # fmt: skip
            _check_saved(record, discard=request.discard)
            with self.host.leases.hold(target.id):  # gc keeps what somebody reads
                return self._restore(record, target, request)

    def _restore(
        self, record: SandboxRecord, target: SnapshotRecord, request: RestoreRequest
    ) -> RestoreAnswer:
        ran, runs = record.state == "running", record.state in ("running", "frozen")
        saved = record.snapshot if record.state == "paused" else None
        pauses: list[Pause] = []

        def pause() -> SandboxRecord:
            pauses.append(Pause(self.host, record, self.guest(record), CaptureRequest()))
            self.captures.capture(pauses[0])
            return pauses[0].record

        verb = Restore(self.host, record, target, pause if runs and not request.discard else None)
        phases: dict[str, float] = {}
        try:
            verb.execute()
            phases |= verb.phases_ms
            notes = self._resume(record.id, target, phases) if ran else []
        except DiapauseError as error:
            saved = self._saved(pauses) or saved
            with operation.shielded():
                raise self._failed(record, target, saved, ran, error) from error
        finally:
            if done := self._saved(pauses):
                self.captures.pack_behind(done)
        saved = self._saved(pauses) or saved
        state = self._state(record.id)
        return RestoreAnswer(
            sandbox=record.id, snapshot=target.id, saved=saved, state=state,
            phases_ms={**phases, "total": verb.elapsed_ms}, notes=notes,
        )  # fmt: skip

    def _saved(self, pauses: list[Pause]) -> str | None:
        return next((verb.snapshot for verb in pauses if verb.committed), None)

    def _state(self, sandbox: str) -> SandboxState:
        record = self.catalog.sandbox(sandbox)
        return cast("SandboxState", record.state if record else "failed")

    def _resume(
        self, sandbox: str, snapshot: SnapshotRecord, phases: dict[str, float]
    ) -> list[str]:
        record = self.catalog.sandbox(sandbox)
        assert record is not None
        verb = Resume(self.host, record, snapshot)
        verb.execute()
        phases["resume"] = verb.elapsed_ms
        return verb.notes

    def _failed(
        self,
        record: SandboxRecord,
        target: SnapshotRecord,
        saved: str | None,
        ran: bool,
        error: DiapauseError,
    ) -> DiapauseError:
        """Back to where it was, as far as that goes; the error says how far."""
        try:
            if saved is not None and (back := self.catalog.snapshot(saved)) is not None:
                now = self.reread(record)
                if now.state == "paused" and now.snapshot != saved:
                    Restore(self.host, now, back, None).execute()
                if now.state == "paused" and ran:
                    self._resume(record.id, back, {})
        except DiapauseError as again:
            error = DiapauseError(cause=f"{error.message} Going back failed too: {again.message}")
        left = self.catalog.sandbox(record.id) or record
        if isinstance(error, Cancelled) and left.state == record.state:
            return error  # nothing came of it
        at = f" at snapshot {left.snapshot}" if left.state == "paused" else ""
        return RestoreFailed(
            sandbox=record.name or record.id, snapshot=target.id, cause=error.message,
            state=f"{left.state}{at}", saved=saved or "nothing",
        )  # fmt: skip


def _check_shape(host: Host, record: SandboxRecord, target: SnapshotRecord) -> None:
    """A sandbox keeps its shape: what a person was promised of it stays true."""
    ours, theirs = asdict(host.shape(record)), asdict(host.shape(target))
    for part, needed in theirs.items():
        if needed != ours[part]:
            raise SnapshotIncompatible(
                snapshot=target.id, part=f"sandbox with {part}", needed=needed, found=ours[part]
            )


def _check_saved(record: SandboxRecord, *, discard: bool) -> None:
    """A guest that ended has no state to save but its disk, which a restore would give up."""
    if record.state in ("stopped", "failed") and not discard:
        needed = "running, frozen or paused, or --discard: what its disk got since is given up"
        raise wrong_state(record, "restore", needed)
