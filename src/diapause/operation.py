"""One thing that a client asked for: its id, how far it is, and whether it was cancelled.

The operation of a thread or task is `current()`. Its id goes through everything done for it: the
journal, log lines, the VMM's commands. Work handed to a pool takes it along by `carried`.

Cancelling is asked for and seen: it takes effect at the next `checkpoint`, or ends a wait made with
`wait_for` or `waking`. Inside `shielded` neither happens: what has to run to its end does, such as
putting back what a cancelled verb did.
"""

from __future__ import annotations

import contextvars
import secrets
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from diapause.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    T = TypeVar("T")

_current: contextvars.ContextVar[Operation | None] = contextvars.ContextVar(
    "diapause-operation", default=None
)
_shields: contextvars.ContextVar[int] = contextvars.ContextVar("diapause-shields", default=0)


def new_operation_id() -> str:
    """A fresh id: 16 hex digits."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Progress:
    """How far a part of an operation is; `total_bytes` is None where nobody knows."""

    what: str
    done_bytes: int
    total_bytes: int | None
    began: float  # monotonic: when this part began


@dataclass(eq=False)
class Operation:
    """See the module; every method may be called from any thread."""

    verb: str
    id: str = field(default_factory=new_operation_id)
    sandbox: str | None = None
    step: str | None = None  # the verb's present step, or what it waits for
    progress: Progress | None = None
    began_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    began: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _waits: set[Callable[[], object]] = field(default_factory=set)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to cancel it."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask for its end; what waits on its behalf wakes."""
        with self._guard:
            self._cancelled.set()
            for wake in self._waits:
                wake()

    @contextmanager
    def waking(self, wake: Callable[[], object]) -> Iterator[None]:
        """Call `wake` if the operation is cancelled while the block runs, or was before."""
        with self._guard:
            self._waits.add(wake)
            if self._cancelled.is_set():
                wake()
        try:
            yield
        finally:
            with self._guard:
                self._waits.discard(wake)


def current() -> Operation | None:
    """The operation that this thread or task works for."""
    return _current.get()


@contextmanager
def under(operation: Operation | None) -> Iterator[None]:
    """Work for an operation."""
    token = _current.set(operation)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def shielded() -> Iterator[None]:
    """What the block does runs to its end, though the operation be cancelled."""
    token = _shields.set(_shields.get() + 1)
    try:
        yield
    finally:
        _shields.reset(token)


def carried(work: Callable[[], T]) -> Callable[[], T]:
    """The same work for the present operation and under the same shields, in any thread."""
    operation, shields = _current.get(), _shields.get()

    def run() -> T:
        token = _shields.set(shields)
        try:
            with under(operation):
                return work()
        finally:
            _shields.reset(token)

    return run


def cancellable() -> Operation | None:
    """The present operation where it can be cancelled here and now."""
    return None if _shields.get() else _current.get()


def checkpoint() -> None:
    """Raise Cancelled if the operation was cancelled, unless shielded."""
    operation = cancellable()
    if operation is not None and operation.cancelled:
        raise Cancelled(operation=operation.id, verb=operation.verb)


def wait_for(future: Future[T], bound_s: float) -> T:
    """What a future comes to; TimeoutError at the bound, Cancelled if the operation is."""
    operation = cancellable()
    if operation is None:
        return future.result(bound_s)
    woken = threading.Event()
    future.add_done_callback(lambda _: woken.set())
    with operation.waking(woken.set):
        woken.wait(bound_s)
    if not future.done():
        checkpoint()
    return future.result(0)


def at_step(step: str) -> None:
    """Say what the operation is at, or waits for; the progress of what came before is over."""
    operation = current()
    if operation is not None:
        operation.step, operation.progress = step, None


def progress(done_bytes: int, total_bytes: int | None, what: str) -> None:
    """Say how far a part of the operation is, as often as one likes."""
    operation = current()
    if operation is None:
        return
    before = operation.progress
    began = before.began if before is not None and before.what == what else time.monotonic()
    operation.progress = Progress(what, done_bytes, total_bytes, began)
