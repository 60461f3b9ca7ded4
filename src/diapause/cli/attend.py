"""What the command line does while a verb runs: shows how far it is, and cancels it on Ctrl-C.

The first interrupt cancels the operation at the daemon, waits a bounded time for what comes of it,
and says what is now the case. A second one leaves at once; the daemon goes on by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diapause.cli.output import say
from diapause.cli.progress import shown
from diapause.errors import Cancelled, DiapauseError, OperationNotFound

if TYPE_CHECKING:
    from diapause.daemon.client import Client
    from diapause.model import OperationAnswer

# How long the daemon may take to put back what a cancelled verb had done.
OUTCOME_S = 60.0
# A request that was interrupted on its way may reach the daemon a little later.
_ARRIVAL_S = 1.0
_POLL_S = 0.05
_UNDER_WAY = ("running", "cancelling")


class Interrupted(Exception):
    """An interrupt came while a verb ran; the text says what became of it."""

    def __init__(self, text: str, operation: str, verb: str) -> None:
        super().__init__(text)
        self.error: DiapauseError = Cancelled(operation=operation, verb=verb)


@contextlib.contextmanager
def attended(client: Client, operation: str) -> Iterator[None]:
    """Around the request of one operation."""
    try:
        with shown(client, operation):
            yield
    except KeyboardInterrupt:
        say("diapause: cancelling; interrupt again to leave at once")
        try:
            found = _cancel(client, operation)
            raise Interrupted(
                _outcome(client, found), operation, found.verb if found else "?"
            ) from None
        except DiapauseError as error:
            text = f"interrupted; the daemon could not be asked: {error.message}"
            raise Interrupted(text, operation, "?") from None


def _cancel(client: Client, operation: str) -> OperationAnswer | None:
    """Cancel it and wait for its end; None where the daemon never heard of it."""
    began = time.monotonic()
    found: OperationAnswer | None = None
    while time.monotonic() < began + OUTCOME_S:
        try:
            found = client.cancel(operation) if found is None else client.operation(operation)
        except OperationNotFound:
            if time.monotonic() > began + _ARRIVAL_S:
                return None
        if found is not None and found.state not in _UNDER_WAY:
            return found
        time.sleep(_POLL_S)
    return found


def _outcome(client: Client, found: OperationAnswer | None) -> str:
    if found is None:
        return "interrupted; nothing had begun"
    now = _now(client, found.sandbox)
    if found.state == "done":
        return f"interrupted too late: it was done already{now}"
    if found.state == "cancelled":
        return f"cancelled: what it had done was put back{now}"
    if found.state in _UNDER_WAY:
        return f"interrupted; after {OUTCOME_S:.0f} s the daemon is still at it ({found.step})"
    message = found.error["message"] if found.error else found.state
    return f"interrupted; it had failed: {message}{now}"


def _now(client: Client, sandbox: str | None) -> str:
    if sandbox is None:
        return ""
    try:
        return f"; sandbox {sandbox} is {client.inspect(sandbox).state}"
    except DiapauseError:
        return ""
