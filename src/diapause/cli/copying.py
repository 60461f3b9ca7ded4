"""The client's end of `diapause cp`: a stream between a file tree here and the agent there.

Bytes go from a pipe to the exec stream or back; what reads or writes files is Rust, in a thread.
What comes from the guest is taken for hostile: its stream by `archive_unpack`, its report by a
limit on its size and by escaping where it is shown.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from diapause.cli.exec_client import ExecClient
from diapause.daemon.client import Client
from diapause.daemon.exec_wire import Control, ExecRequest
from diapause.errors import (
    AgentTooOld,
    ArchiveRefused,
    CopyFailed,
    DiapauseError,
    ExecCut,
    InvalidRequest,
)
from diapause.units import KIB

Progress = Callable[[int, int], None]

AGENT = "diapause-agent"  # the agent answers to it, wherever its image keeps it
_REPORT_BYTES_MAX = 64 * KIB
_CUT_OFF = "the stream ends before its end"
# Of an agent without these commands, or of a guest without such an agent.
_TOO_OLD = (2, 126, 127)


@dataclass(frozen=True)
class Remote:
    """A path in a sandbox."""

    sandbox: str
    path: str


class Failure(msgspec.Struct):
    """Why the agent's end failed."""

    kind: str
    path: str
    cause: str


class Report(msgspec.Struct):
    """What the agent's end says when it has ended."""

    entries: int = 0
    bytes: int = 0
    notes: list[str] = []
    more_notes: int = 0
    error: Failure | None = None


class Copied(msgspec.Struct):
    """What a copy did, for people and as JSON."""

    source: str
    destination: str
    entries: int
    bytes: int
    notes: list[str]


def operand(text: str) -> Remote | str:
    """`SANDBOX:PATH`, or a path here; raises InvalidRequest."""
    sandbox, colon, path = text.partition(":")
    if not colon or "/" in sandbox or not sandbox:
        return text
    if not path or "\0" in path:
        raise InvalidRequest(what=f"{text!r}", cause="a path is missing after the sandbox")
    return Remote(sandbox, path)


def top_of(path: str) -> str | None:
    """The name that a copy of it has; None where its contents are meant (`dir/.`, `/`)."""
    name = path.rstrip("/").rpartition("/")[2]
    return None if name in ("", ".", "..") else name


def copy_out(client: Client, source: Remote, destination: str, progress: Progress) -> Copied:
    """From a sandbox to here. Raises ArchiveRefused, CopyFailed, AgentTooOld, ExecCut."""
    from diapause._core import archive_unpack

    top = top_of(source.path)
    name = None if top is None else os.fsencode(top)
    with _pipe() as (readable, writable), _nothing() as nothing:
        work = _Work(
            lambda tell: archive_unpack(readable.fd, destination, name, tell), progress, readable
        )
        argv = [AGENT, "pack", source.path, top or "."]
        session = _Session(client, source.sandbox, argv, nothing.fd, writable, work)
        report = session.run_with(work)
    done = work.result
    notes = [*done.notes, *_notes(done.more_notes), *report.notes, *_notes(report.more_notes)]
    shown = f"{source.sandbox}:{source.path}"
    return Copied(shown, destination, done.entries, done.bytes, notes)


def copy_in(client: Client, source: str, destination: Remote, progress: Progress) -> Copied:
    """From here into a sandbox. Raises ArchiveRefused, CopyFailed, AgentTooOld, ExecCut."""
    from diapause._core import archive_pack

    top = top_of(source)
    with _pipe() as (readable, writable), _nothing() as nothing:
        name = os.fsencode(top or ".")
        work = _Work(lambda tell: archive_pack(source, name, writable.fd, tell), progress, writable)
        argv = [AGENT, "unpack", destination.path, *([top] if top else [])]
        session = _Session(client, destination.sandbox, argv, readable.fd, nothing, work)
        session.feeds = readable
        report = session.run_with(work)
    notes = [*work.result.notes, *_notes(work.result.more_notes), *report.notes]
    shown = f"{destination.sandbox}:{destination.path}"
    return Copied(source, shown, report.entries, report.bytes, [*notes, *_notes(report.more_notes)])


def _notes(more: int) -> list[str]:
    return [f"and {more} more such notes"] if more else []


class _End:
    """One end of a pipe, closed once, by whoever is first."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._open = True

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self.fd)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[_End, _End]]:
    readable, writable = (_End(fd) for fd in os.pipe())
    try:
        yield readable, writable
    finally:
        readable.close()
        writable.close()


@contextlib.contextmanager
def _nothing() -> Iterator[_End]:
    nothing = _End(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    try:
        yield nothing
    finally:
        nothing.close()


class _Work:
    """The Rust end, in a thread of its own; it closes its end of the pipe when it has ended."""

    def __init__(self, work: Callable[[Progress], Any], progress: Progress, end: _End) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._cancelled = False
        self._work, self._progress, self._end = work, progress, end
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def _tell(self, done: int, total: int) -> None:
        if self._cancelled:
            raise KeyboardInterrupt
        self._progress(done, total)

    def _run(self) -> None:
        try:
            self.result = self._work(self._tell)
        except (DiapauseError, OSError, ValueError, KeyboardInterrupt) as error:
            self.error = error
        finally:
            self._end.close()

    def cancel(self) -> None:
        """It ends at its next piece; what it made is removed."""
        self._cancelled = True

    def join(self) -> None:
        """Wait for its end: it has one, as the other end of its pipe is closed."""
        self._thread.join()


class _Collector:
    """The agent's report: what it writes to its errors, up to a limit."""

    has_room = True

    def __init__(self) -> None:
        self.text = bytearray()

    def put(self, data: memoryview) -> None:
        self.text += data[: _REPORT_BYTES_MAX - len(self.text)]

    def finish(self) -> None:
        """Nothing waits here."""

    def take_failure(self) -> OSError | None:
        """Memory does not fail."""
        return None


class _Session(ExecClient):
    """The agent's end of a copy: a signal here cancels both ends."""

    feeds: _End | None = None

    def __init__(
        self,
        client: Client,
        sandbox: str,
        argv: list[str],
        stdin: int,
        stdout: _End,
        work: _Work,
    ) -> None:
        self._sandbox, self._out, self._collector = sandbox, stdout, _Collector()
        self._copies_in = argv[1] == "unpack"
        request = ExecRequest(argv=argv, stdin=self._copies_in)
        super().__init__(client, sandbox, request, (stdin, stdout.fd, 2))
        self._writers[2] = self._collector  # type: ignore[assignment]

    def run_with(self, work: _Work) -> Report:
        """Run both ends to their end; the agent's report. Raises what went wrong first."""
        cut: DiapauseError | None = None
        work.start()
        try:
            code = self.run()
        except DiapauseError as error:
            cut = error
        except BaseException:
            work.cancel()
            raise
        finally:
            # Written first: a thread that still writes must not find its number used anew.
            self._finish_writing()
            for end in (self._out, self.feeds):
                if end is not None:
                    end.close()
            self._wait_for(work)
        if cut is not None:
            raise_first(work.error, cut)
        report, failure = self._look_at_report(code)
        raise_first(work.error, failure)
        return report

    def _wait_for(self, work: _Work) -> None:
        try:
            work.join()
        except KeyboardInterrupt:
            work.cancel()
            work.join()
            raise

    def _look_at_report(self, code: int) -> tuple[Report, DiapauseError | None]:
        try:
            report = msgspec.json.decode(bytes(self._collector.text), type=Report)
        except (msgspec.DecodeError, RecursionError):
            if code in _TOO_OLD:
                return Report(), AgentTooOld(sandbox=self._sandbox, what="`cp`")
            return Report(), CopyFailed(
                what=f"in sandbox {self._sandbox}",
                cause=f"its end of the copy ended with {code} and no report",
            )
        if report.error is None and code != 0:
            report.error = Failure(kind="file", path="", cause=f"its end ended with {code}")
        return report, None if report.error is None else _as_error(self._sandbox, report.error)

    # A signal or a reader that failed: the copy is over.

    def _pass_signals_on(self) -> None:
        for number in self._wakeups.take_signals():
            self._end_it()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)

    def _look_at_writers(self) -> None:
        if any(writer.take_failure() for writer in self._writers.values()):
            self._end_it()
            raise ExecCut(cause="the copy was ended from here")

    def _end_it(self) -> None:
        # One that unpacks sees its input end, and removes what it made.
        if not self._copies_in:
            self._send_text(Control(signal=signal.SIGTERM))
            self._send()


def _as_error(sandbox: str, failure: Failure) -> DiapauseError:
    if failure.kind == "refused":
        return ArchiveRefused(entry=failure.path, cause=failure.cause)
    what = f"{sandbox}:{failure.path}" if failure.path else ""
    return CopyFailed(what=what, cause=failure.cause)


def raise_first(ours: BaseException | None, theirs: DiapauseError | None) -> None:
    """Raise what went wrong first: when one end fails, the other sees the stream end."""
    errors = [error for error in (ours, theirs) if error is not None]
    for error in errors:
        if not _is_consequence(error):
            raise error
    if errors:
        raise errors[0]


def _is_consequence(error: BaseException) -> bool:
    if isinstance(error, CopyFailed):
        return not error.fields.get("what")
    return isinstance(error, ArchiveRefused) and error.fields.get("cause") == _CUT_OFF
