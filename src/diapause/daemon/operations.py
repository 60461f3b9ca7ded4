"""What clients asked of this daemon: what is under way, and the last that ended.

Used in the event loop alone, but for `Operation` itself, which the workers share. What an earlier
daemon did is read from the journal.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from diapause import limits
from diapause.errors import Cancelled, DiapauseError, InvalidRequest, OperationNotFound
from diapause.model import OperationAnswer, ProgressInfo
from diapause.operation import Operation, new_operation_id

if TYPE_CHECKING:
    from diapause.journal import Journal, OperationRecord
    from diapause.model import OperationState

_ID = re.compile(r"[0-9a-f]{16}")


class Asked:
    """One operation and what it comes to: the encoded answer, or what it raised."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.outcome: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.ended: float | None = None

    def end(self, outcome: bytes | BaseException) -> None:
        """It is over; whoever waits for `outcome` goes on."""
        self.ended = time.monotonic()
        if isinstance(outcome, bytes):
            self.outcome.set_result(outcome)
            return
        self.outcome.set_exception(outcome)
        self.outcome.exception()  # looked at: nobody else may ever ask

    @property
    def answer(self) -> OperationAnswer:
        """As the API tells it."""
        operation, error = self.operation, self._error()
        ended = self.ended if self.ended is not None else time.monotonic()
        return OperationAnswer(
            operation=operation.id, verb=operation.verb, state=self._state(error),
            sandbox=operation.sandbox, step=operation.step, began_at=operation.began_at,
            elapsed_ms=round((ended - operation.began) * 1e3, 3),
            progress=_progress(operation) if self.ended is None else None,
            error=None if error is None else error.to_dict(),
        )  # fmt: skip

    def _error(self) -> DiapauseError | None:
        if self.ended is None or (error := self.outcome.exception()) is None:
            return None
        return error if isinstance(error, DiapauseError) else DiapauseError(cause=str(error))

    def _state(self, error: DiapauseError | None) -> OperationState:
        if self.ended is None:
            return "cancelling" if self.operation.cancelled else "running"
        if error is None:
            return "done"
        return "cancelled" if isinstance(error, Cancelled) else "failed"


class Operations:
    """The operations of one daemon, by id."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, Asked] = OrderedDict()

    def begin(self, verb: str, sandbox: str | None, wanted: str | None) -> Asked:
        """A new operation, under the id that the client chose, if it did."""
        if wanted is not None:
            self._check(wanted)
        operation = Operation(verb, wanted or new_operation_id(), sandbox)
        asked = self._asked[operation.id] = Asked(operation)
        self._asked.move_to_end(operation.id)
        self._forget_oldest()
        return asked

    def _check(self, wanted: str) -> None:
        if not _ID.fullmatch(wanted):
            cause = "it is 16 lower-case hex digits"
            raise InvalidRequest(what="the header Operation-Id", cause=cause)
        if (known := self._asked.get(wanted)) is not None and known.ended is None:
            cause = "an operation of this id is under way"
            raise InvalidRequest(what="the header Operation-Id", cause=cause)

    def _forget_oldest(self) -> None:
        ended = [key for key, asked in self._asked.items() if asked.ended is not None]
        for key in ended[: max(0, len(ended) - limits.OPERATIONS_SEEN_MAX)]:
            del self._asked[key]

    def under_way(self, operation: str) -> Asked | None:
        """The operation, if it has not ended."""
        asked = self._asked.get(operation)
        return asked if asked is not None and asked.ended is None else None

    def find(self, operation: str) -> Asked | None:
        """The operation, if this daemon knows it."""
        return self._asked.get(operation)


def of_journal(journal: Journal, operation: str) -> OperationAnswer:
    """What an earlier daemon did, or a run of a verb; raises OperationNotFound."""
    if not _ID.fullmatch(operation):
        raise OperationNotFound(operation=operation[:80])
    found = journal.operations_of(operation)
    if not found:
        raise OperationNotFound(operation=operation)
    last = found[-1]
    return OperationAnswer(
        operation=operation, verb=last.verb, state=_recorded_state(found), sandbox=last.sandbox,
        step=last.steps[-1] if last.steps else None, began_at=found[0].began_at, elapsed_ms=0.0,
    )  # fmt: skip


def _recorded_state(found: list[OperationRecord]) -> OperationState:
    outcomes = [operation.outcome or "" for operation in found]
    if any(operation.ended_at is None for operation in found):
        return "running"
    if all(outcome == "done" for outcome in outcomes):
        return "done"
    if any(outcome == "recovered" for outcome in outcomes):
        return "recovered"
    return "cancelled" if any(o.endswith(Cancelled.code) for o in outcomes) else "failed"


def _progress(operation: Operation) -> ProgressInfo | None:
    progress = operation.progress
    if progress is None:
        return None
    return ProgressInfo(
        what=progress.what, done_bytes=progress.done_bytes, total_bytes=progress.total_bytes,
        elapsed_ms=round((time.monotonic() - progress.began) * 1e3, 3),
    )  # fmt: skip
