"""What a daemon that died had made for a request under an idempotency key, told from the rows.

The request's operation is in the journal, with every verb that was begun for it. Recovery has
settled those by now: a new sandbox is there and whole, or it was removed; a capture was committed,
or it left nothing. Verbs that answer what is done already need nothing of this: asked again, they
find it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diapause.model import Answer, CaptureRequest, ForkAnswer, ForkRequest, RunAnswer, RunRequest
from diapause.sandbox import views
from diapause.sandbox.remove import Remove
from diapause.sandbox.resume import Boot, Fork
from diapause.sandbox.warm import FirstRun, WarmRun

if TYPE_CHECKING:
    from diapause.catalog import SandboxRecord
    from diapause.journal import OperationRecord
    from diapause.sandbox.host import Host

_MAKERS = {verb.name for verb in (Boot, FirstRun, WarmRun, Fork)}
_NOTE = "the daemon that did this died before it could answer; times are not known"


def made_by(host: Host, operation: str, request: object) -> Answer | None:
    """The answer to a request, where its operation did what was asked; else None.

    A fork that is not complete is removed: all or none.
    """
    begun = host.catalog.journal.operations_of(operation)
    if isinstance(request, RunRequest):
        return _run(_new_sandboxes(host, begun), request)
    if isinstance(request, ForkRequest):
        return _fork(host, _new_sandboxes(host, begun), request)
    if isinstance(request, CaptureRequest):
        return _capture(host, begun)
    return None


def _new_sandboxes(host: Host, begun: list[OperationRecord]) -> list[SandboxRecord]:
    """Those that were begun and are still there."""
    ids = [one.sandbox for one in begun if one.verb in _MAKERS]
    found = [host.catalog.sandbox(sandbox) for sandbox in ids]
    gone = ("creating", "removing", "removed")
    return [record for record in found if record is not None and record.state not in gone]


def _run(made: list[SandboxRecord], request: RunRequest) -> RunAnswer | None:
    named = [record for record in made if record.name == request.name]
    if not named:
        return None
    record = named[-1]
    return RunAnswer(sandbox=record.id, name=record.name, ready_ms=0.0, phases_ms={}, notes=[_NOTE])


def _fork(host: Host, made: list[SandboxRecord], request: ForkRequest) -> ForkAnswer | None:
    if len(made) == request.count and made[0].snapshot is not None:
        ids = [record.id for record in made]
        return ForkAnswer(sandboxes=ids, snapshot=made[0].snapshot, phases_ms={}, notes=[_NOTE])
    for record in made:
        with host.locks.hold(record.id):
            Remove(host, record).execute()
    return None


def _capture(host: Host, begun: list[OperationRecord]) -> Answer | None:
    for one in begun:
        if one.verb not in ("pause", "save") or one.snapshot is None:
            continue
        if (snapshot := host.catalog.snapshot(one.snapshot)) is not None:
            answer = views.captured_before(one.sandbox, snapshot)
            answer.notes.append(_NOTE)
            return answer
    return None
