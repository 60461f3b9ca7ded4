"""From what a person writes to a row: an id, a unique prefix of one, or a name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

import msgspec

from diapause.errors import (
    AmbiguousReference,
    InvalidRequest,
    SandboxNotFound,
    SnapshotNotFound,
)
from diapause.limits import NAME_LENGTH_MAX, REFERENCE_LENGTH_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diapause.catalog import Catalog, SandboxRecord, SnapshotRecord

    Row = TypeVar("Row", SandboxRecord, SnapshotRecord)

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*")
_CANDIDATES_MAX = 20


def check_name(name: str | None) -> None:
    """Refuse a name that can't be typed, printed or told from an id."""
    if name is None:
        return
    if len(name) > NAME_LENGTH_MAX or not _NAME.fullmatch(name):
        cause = f"use letters, digits, '.', '_', '-', at most {NAME_LENGTH_MAX} of them"
        raise InvalidRequest(what=f"The name {name[:80]!r}", cause=cause)


def host_name(name: str) -> str:
    """A sandbox's name as a host name, which knows fewer characters."""
    return name.replace("_", "-")


def labels(rows: Sequence[SandboxRecord] | Sequence[SnapshotRecord]) -> str:
    """Ids and names for an error."""
    found = [f"{row.id} ({row.name})" if row.name else row.id for row in rows]
    more = f" and {len(found) - _CANDIDATES_MAX} more" if len(found) > _CANDIDATES_MAX else ""
    return ", ".join(found[:_CANDIDATES_MAX]) + more or "none"


def _one(rows: Sequence[Row], reference: str) -> Row | None:
    """The row with this id or name, else the only one whose id begins so."""
    if len(reference) > REFERENCE_LENGTH_MAX or not reference:
        raise InvalidRequest(what="The reference", cause="it is empty or too long")
    exact = [row for row in rows if reference in (row.id, row.name)]
    found = exact or [row for row in rows if row.id.startswith(reference)]
    if len(found) > 1:
        raise AmbiguousReference(reference=reference, candidates=labels(found))
    return found[0] if found else None


def find_sandbox(catalog: Catalog, reference: str) -> SandboxRecord:
    """The one sandbox that is meant."""
    exact = catalog.sandbox(reference)
    if exact is not None and exact.state != "removed":
        return exact  # without a look at all the others
    rows = catalog.sandboxes()
    if (found := _one(rows, reference)) is None:
        raise SandboxNotFound(reference=reference, candidates=labels(rows))
    return found


def find_snapshot(catalog: Catalog, reference: str) -> SnapshotRecord:
    """The one snapshot that is meant."""
    exact = catalog.snapshot(reference)
    if exact is not None and exact.removed_at is msgspec.UNSET:
        return exact  # without a look at all the others
    rows = catalog.snapshots()
    if (found := _one(rows, reference)) is None:
        raise SnapshotNotFound(reference=reference, candidates=labels(rows))
    return found
