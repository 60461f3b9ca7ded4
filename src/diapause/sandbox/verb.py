"""A verb: a list of named steps, each journaled before it is taken.

A subclass names its steps in order and has a method `do_STEP` for each. When one fails, `undo` puts
back what the steps before it did, and the operation is closed with the error's code. A daemon that
is killed leaves the operation open; recovery reads its last step and asks the world what happened.

A cancel is seen before each step and in the long waits of a step, up to the step `sure_from`: from
there on, and while it is put back, a verb runs to its end.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, ClassVar

from diapause import operation
from diapause.errors import DiapauseError
from diapause.sandbox.rescue import REFUSALS, close_later
from diapause.store.boot import boot_id
from diapause.store.files import unexpected_storage_error

if TYPE_CHECKING:
    from diapause.sandbox.host import Host

log = logging.getLogger("diapause.verb")


def new_id() -> str:
    """A fresh id for a sandbox, a snapshot or an operation: 16 hex digits."""
    return secrets.token_hex(8)


class Verb:
    """One run of one verb on one sandbox."""

    name: ClassVar[str]
    steps: ClassVar[tuple[str, ...]]
    sure_from: ClassVar[str] = ""  # from this step on it is not cancelled; empty: from the first

    def __init__(self, host: Host, sandbox: str, snapshot: str | None = None) -> None:
        self.host, self.sandbox, self.snapshot = host, sandbox, snapshot
        self.operation = new_id()
        requested = operation.current()
        self.asked = requested.id if requested is not None else None  # by a client
        self.phases_ms: dict[str, float] = {}
        self.left_to_recovery = False  # too far to be undone: a failure leaves the operation open
        self.began = time.perf_counter()

    def __init_subclass__(cls) -> None:
        missing = [s for s in getattr(cls, "steps", ()) if not hasattr(cls, f"do_{s}")]
        assert not missing, f"{cls.__name__} has no method for {missing}"
        known = not cls.sure_from or cls.sure_from in cls.steps
        assert known, f"{cls.__name__} has no step {cls.sure_from}"

    def execute(self) -> None:
        """Take every step; on an error or a cancel, undo and raise it."""
        self._begin()
        journal = self.host.catalog.journal
        step, sure = "", self.steps.index(self.sure_from) if self.sure_from else 0
        try:
            for number, step in enumerate(self.steps[:sure]):
                operation.checkpoint()
                journal.step(self.operation, number, step)
                self._take(step)
            operation.checkpoint()
            with operation.shielded():
                for number, step in enumerate(self.steps[sure:], sure):
                    journal.step(self.operation, number, step)
                    self._take(step)
        except BaseException as found:
            error = self._typed(step, found)
            with operation.shielded():
                self._fail(step, error)
            if error is not found:
                raise error from found
            raise
        self._close("done")
        self._say(logging.INFO, "done", "done in %.1f ms", self.elapsed_ms)

    def _begin(self) -> None:
        journal = self.host.catalog.journal
        known = (self.operation, self.name, self.sandbox, self.snapshot, boot_id(), self.asked)
        try:
            journal.begin(*known)
        except BaseException:
            self.host.settle_later(self.sandbox)  # a new sandbox has its row by now
            raise

    def _take(self, step: str) -> None:
        operation.at_step(step)
        began = time.perf_counter()
        try:
            getattr(self, f"do_{step}")()
        finally:
            self.phases_ms[step] = round((time.perf_counter() - began) * 1e3, 3)

    def _typed(self, step: str, error: BaseException) -> BaseException:
        """A file system may refuse anything, anywhere: that has a name of its own."""
        what = f"Step {step} of {self.name}"
        return unexpected_storage_error(what, self.host.home.root, error) or error

    def _fail(self, step: str, error: BaseException) -> None:
        code = error.code if isinstance(error, DiapauseError) else type(error).__name__
        outcome = error.code if isinstance(error, DiapauseError) else DiapauseError.code
        self._say(logging.WARNING, outcome, "failed at %s: %s", step, error)
        self.host.event("verb_failed", self.sandbox, verb=self.name, step=step, code=outcome)
        try:
            self.undo(step, error)
        except Exception:
            # The operation stays open: recovery settles what could not be put back.
            log.exception("%s %s: putting back", self.name, self.sandbox)
            self.left_to_recovery = True
        if self.left_to_recovery:
            self.host.settle_later(self.sandbox)
            return
        self._close(f"{step}: {code}")

    def _close(self, outcome: str) -> None:
        """The journal's last word: what the verb did stands, whether that can be written or not."""
        try:
            self.host.catalog.journal.end(self.operation, outcome)
        except REFUSALS as error:
            log.warning("%s %s: its end is not journaled yet: %s", self.name, self.sandbox, error)
            self.host.watch(lambda: close_later(self.host, self.operation, outcome))

    def _say(self, level: int, outcome: str, text: str, *values: object) -> None:
        """The end of this verb, once in the log and once in the metrics."""
        known = {
            "operation": self.asked or self.operation, "verb": self.name, "sandbox": self.sandbox,
            "snapshot": self.snapshot, "outcome": outcome, "duration_ms": self.elapsed_ms,
            "phases_ms": self.phases_ms,
        }  # fmt: skip
        log.log(level, f"%s %s: {text}", self.name, self.sandbox, *values, extra=known)
        self.host.metrics.verb_ended(self.name, outcome, self.elapsed_ms, self.phases_ms)

    def undo(self, step: str, error: BaseException) -> None:
        """Put back what was done before `step` failed."""

    @property
    def elapsed_ms(self) -> float:
        """Since the verb was asked for."""
        return round((time.perf_counter() - self.began) * 1e3, 3)
