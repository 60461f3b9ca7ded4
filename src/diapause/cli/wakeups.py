"""Signals and other threads, as something that a poll can wait for.

A handler only notes its signal; what is to be done happens in the loop that polls. Nothing is lost
when the pipe is full: it wakes as well as one more byte in it would.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator

from diapause.units import KIB


class Wakeups:
    """A pipe that becomes readable on a signal or a call of `wake`."""

    def __init__(self) -> None:
        self.readable, self._written = os.pipe()
        os.set_blocking(self.readable, False)
        os.set_blocking(self._written, False)
        self._signals: list[int] = []

    def wake(self) -> None:
        """Wake the loop; from any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._written, b"\0")

    def drain(self) -> None:
        """Let the pipe be quiet again."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.readable, 4 * KIB):
                pass

    def take_signals(self) -> list[int]:
        """The signals since the last call, in their order."""
        taken: list[int] = []
        while self._signals:
            taken.append(self._signals.pop(0))
        return taken

    @contextlib.contextmanager
    def handling(self, numbers: Iterable[int]) -> Iterator[None]:
        """Note these signals, instead of what they did before, which comes back."""
        before = {number: signal.signal(number, self._note) for number in numbers}
        wakeup = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self._signals.append(number)
