"""Which event a change of a row is. The catalog notes it in the transaction that writes the row.

So there is one place where states change and one where that is told, and the two can't disagree,
whichever verb or recovery made the change. What no row tells is noted where it happens: `stalled`,
`thawed` of a guest that nobody owned, `verb_failed`, `gc`, `repaired`, `daemon_started`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import msgspec

from diapause.model import EventKind

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS: tuple[str, ...] = get_args(EventKind)

# What a sandbox came to, by the state it left and the one it is in; "" stands for any other.
_CHANGES: dict[tuple[str, str], EventKind] = {
    ("creating", "running"): "running",
    ("resuming", "running"): "resumed",
    ("running", "frozen"): "frozen",
    ("frozen", "running"): "thawed",
    ("", "stopped"): "stopped",
    ("", "failed"): "failed",
    ("", "removed"): "removed",
    ("pausing", "paused"): "paused",
    ("running", "paused"): "paused",
}

Told = tuple[EventKind, dict[str, Any]]


def of_sandbox(before: str | None, row: Any) -> Told | None:
    """What a sandbox's row tells, beside the state that it had; None where there is no news."""
    if before is None:
        if row.state == "removed":
            return None
        detail = {"name": row.name, "image": row.image}
        return ("created", detail) if row.snapshot is None else ("forked", detail)
    if before == row.state:
        return None
    kind = _CHANGES.get((before, row.state)) or _CHANGES.get(("", row.state))
    if kind is None:
        return None
    detail = {"name": row.name}
    if kind in ("stopped", "failed"):
        detail |= {"reason": row.reason, **_cause(row.error)}
    return kind, detail


def of_snapshot(before: str | None, row: Any, *, paused: bool) -> Told | None:
    """The same of a snapshot's row; that of a pause is told by its sandbox."""
    if before is None:
        if paused or row.state == "failed":
            return None
        captured = {"dirty_pages": row.dirty_pages, "frozen_ms": row.frozen_ms}
        return "saved", {"name": row.name, "durability": row.durability, **captured}
    if before != row.state and row.state == "packed":
        return "packed", {"stored_bytes": sum(device.stored_bytes for device in row.devices)}
    if before != row.state and row.state == "failed":
        return "snapshot_failed", _cause(row.error)
    if row.state == "captured" and row.error is not None and row.removed_at is msgspec.UNSET:
        return "pack_failed", _cause(row.error)
    return None


def _cause(error: Mapping[str, Any] | None) -> dict[str, Any]:
    """The code and the sentence of an error; its fields may hold what a console said."""
    return {key: error[key] for key in ("code", "message") if key in error} if error else {}
