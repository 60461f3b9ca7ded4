"""The states of a sandbox and which verb leads from which to which.

    run       (none)            -> creating -> running
    pause     running, frozen   -> pausing  -> paused
    resume    paused            -> resuming -> running
    resume --cold               stopped, failed -> resuming -> running
    restore   running           -> paused -> resuming -> running
    restore   frozen, paused, stopped, failed -> paused
    fork      (a snapshot)      -> creating -> running, for each new sandbox
    save      running, frozen   -> as it was
    freeze    running           -> frozen
    thaw      frozen            -> running
    rm        any but removing  -> removing -> (gone)
    (VMM)     running, frozen   -> stopped, by the guest's own doing, or failed

A verb that fails puts the sandbox back where it was. What a verb finds done already is a success
that says so.
"""

from __future__ import annotations

from diapause.catalog import SandboxRecord
from diapause.errors import WrongState

_ADVICE = {
    "paused": "`diapause resume {id}` brings it back.",
    "stopped": "It ended ({reason}). `diapause resume {id} --cold` boots it on its own disk; "
    "its last snapshot is {snapshot}.",
    "failed": "`diapause inspect {id}` says why. `diapause resume {id} --cold` boots it on its "
    "own disk; its last snapshot is {snapshot}.",
    "creating": "It is being started; try again.",
    "resuming": "It is being resumed; try again.",
    "pausing": "It is being paused; try again.",
    "removing": "It is being removed.",
    "running": "`diapause pause {id}` pauses it.",
    "frozen": "`diapause thaw {id}` lets it go on.",
}


def wrong_state(record: SandboxRecord, verb: str, needed: str) -> WrongState:
    """The refusal of a verb, with what to do instead."""
    advice = _ADVICE.get(record.state, "").format(
        id=record.name or record.id, reason=record.reason, snapshot=record.snapshot or "none"
    )
    return WrongState(
        sandbox=record.name or record.id,
        state=record.state,
        verb=verb,
        needed=needed,
        advice=advice,
    )


def require(record: SandboxRecord, verb: str, *states: str) -> None:
    """Refuse a verb in any other state."""
    if record.state not in states:
        raise wrong_state(record, verb, " or ".join(states))
