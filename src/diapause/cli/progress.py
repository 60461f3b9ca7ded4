"""How far a long verb is, on stderr: a line that changes on a terminal, a few plain ones elsewhere.

Nothing is shown of what ends within a second. Where bytes are known there is a rate and the time
that is left; the figures are the daemon's (`/v1/operations`), asked for beside the verb itself.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from diapause.cli.output import printable, say
from diapause.errors import DiapauseError
from diapause.units import format_size

if TYPE_CHECKING:
    from diapause.daemon.client import Client
    from diapause.model import OperationAnswer, ProgressInfo

_QUIET_S = 1.0
_ON_A_TERMINAL_S = 0.25
_ELSEWHERE_S = 5.0
_END_S = 5.0

_labels: list[str] = []


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """What the verb of the block is called while it is shown."""
    _labels.append(what)
    try:
        yield
    finally:
        _labels.pop()


@contextlib.contextmanager
def shown(client: Client, operation: str) -> Iterator[None]:
    """Show how far the operation is, until the block ends."""
    ended = threading.Event()
    watch = _on_a_terminal if sys.stderr.isatty() else _elsewhere
    # A daemon thread: an interrupt need not wait for its question to be answered.
    thread = threading.Thread(target=_watch, args=(watch, client, operation, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_END_S)


def _watch(watch: object, client: Client, operation: str, ended: threading.Event) -> None:
    assert callable(watch)
    if ended.wait(_QUIET_S):
        return
    # Without its progress a verb is as good; with its daemon gone, the verb itself says so. No
    # daemon is started for the question: one that is told to stop ends the verb, but listens no
    # more, and whoever stopped it may be about to remove the home.
    with contextlib.suppress(DiapauseError, OSError):
        watch(client.of_running(), operation, ended)


def _on_a_terminal(client: Client, operation: str, ended: threading.Event) -> None:
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(line(client.operation(operation)))) as status:
        while not ended.wait(_ON_A_TERMINAL_S):
            status.update(Text(line(client.operation(operation))))


def _elsewhere(client: Client, operation: str, ended: threading.Event) -> None:
    """Only what has figures, and only what is new."""
    before = ""
    while not ended.is_set():
        answer = client.operation(operation)
        if answer.progress is not None and (text := line(answer)) != before:
            say(text)
            before = text
        if ended.wait(_ELSEWHERE_S):
            return


def line(answer: OperationAnswer) -> str:
    """One line about an operation: its name, its step, and figures where there are any."""
    name = _labels[-1] if _labels else answer.verb
    step = "" if answer.step is None else f": {answer.step}"
    figures = "" if answer.progress is None else f", {_figures(answer.progress)}"
    return printable(f"{name}{step}{figures} ({answer.elapsed_ms / 1000:.0f} s)")


def _figures(progress: ProgressInfo) -> str:
    done = format_size(progress.done_bytes)
    if progress.total_bytes is None:
        return f"{progress.what} {done}"
    text = f"{progress.what} {done} of {format_size(progress.total_bytes)}"
    rate = progress.done_bytes / max(progress.elapsed_ms / 1000, 0.001)  # bytes a second
    if not progress.done_bytes:
        return text
    left_s = max(0, progress.total_bytes - progress.done_bytes) / rate
    return f"{text}, {format_size(int(rate))}/s, {left_s:.0f} s left"


@contextlib.contextmanager
def moving(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how much of `what` was moved, at what rate, and how long it may still take.

    The function takes bytes done and bytes in all, 0 where that is not known; from any thread.
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(printable(what), total=None)
        yield lambda done, total: shown.update(task, completed=done, total=max(total, done) or None)
