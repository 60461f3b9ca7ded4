"""A client of the daemon: HTTP over its unix socket, answers as the engine's own types.

One connection a call; a daemon that is not there is started. Imports little, since every run of the
command line pays for it. Failures of the daemon come back as the class they were.
"""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from diapause import limits, model
from diapause.daemon.start import DaemonCommand, connect, daemon_command
from diapause.errors import DaemonUnreachable, DiapauseError, InvalidRequest, from_dict
from diapause.model import Event
from diapause.store.home import Home
from diapause.units import KIB, MIB

T = TypeVar("T")

# Longer than any verb may take: a daemon that is silent for so long is taken for dead.
VERB_S = limits.PACK_S + limits.LOCK_S
ANSWER_BYTES_MAX = 256 * MIB
_READ_BYTES = 64 * KIB
_RETRY_S = 0.02


class _Connection(http.client.HTTPConnection):
    """HTTP over a connected socket."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__("diapause")
        self._connected = connected

    def connect(self) -> None:
        self.sock = self._connected


# Goes around each verb: shows how far its operation is, and cancels it on an interrupt.
Attend = Callable[["Client", str], AbstractContextManager[None]]


class Client:
    """The verbs of one home's daemon."""

    def __init__(
        self,
        home: Home,
        command: DaemonCommand | None = daemon_command,
        bound_s: float = VERB_S,
        attend: Attend = lambda client, operation: nullcontext(),
    ) -> None:
        """Without a command none is started, and where none runs it is DaemonUnreachable."""
        self.home = home
        self._command, self._bound_s, self._attend = command, bound_s, attend

    def of_running(self) -> Client:
        """The same for the daemon that runs: it starts none."""
        return Client(self.home, None, self._bound_s)

    def begin(self, attempt: Callable[[socket.socket], T]) -> T:
        """What `attempt` makes of a connection to the daemon, which is started if there is none.

        An attempt that fails with a reset or a broken pipe is made again: the kernel reports those,
        and not an end of file, where the daemon died without having read all that was sent, so
        nothing was begun.
        """
        deadline = time.monotonic() + limits.DAEMON_START_S
        while True:
            connected = connect(self.home, self._command)
            try:
                return attempt(connected)
            except (ConnectionResetError, BrokenPipeError) as error:
                connected.close()
                ended = isinstance(error, http.client.RemoteDisconnected)
                if ended or time.monotonic() > deadline:
                    raise _gone(self.home, error) from error
            except BaseException:
                connected.close()
                raise
            time.sleep(_RETRY_S)

    def doctor(self) -> model.DoctorAnswer:
        """Prove what this host can do."""
        return self._call("POST", "/v1/doctor", model.DoctorAnswer)

    def bench(self, request: model.BenchRequest) -> model.BenchAnswer:
        """Measure what this host does."""
        return self._call("POST", "/v1/bench", model.BenchAnswer, request)

    def build_image(self, request: model.ImageBuildRequest) -> model.ImageInfo:
        """Build an image, or find that it exists."""
        return self._call("POST", "/v1/images", model.ImageInfo, request)

    def import_image(self, request: model.ImageImportRequest) -> model.ImageInfo:
        """Make an image of a kernel and a root file system of somebody's own."""
        return self._call("POST", "/v1/images/import", model.ImageInfo, request)

    def images(self) -> list[model.ImageInfo]:
        """All images."""
        return self._call("GET", "/v1/images", list[model.ImageInfo])

    def inspect_image(self, name: str) -> model.ImageDetail:
        """One image, and who needs it."""
        return self._call("GET", f"/v1/images/{segment(name)}", model.ImageDetail)

    def remove_image(self, name: str) -> model.RemoveImageAnswer:
        """Remove an image that nobody needs."""
        return self._call("DELETE", f"/v1/images/{segment(name)}", model.RemoveImageAnswer)

    def run(self, request: model.RunRequest) -> model.RunAnswer:
        """Make a sandbox and start it."""
        return self._call("POST", "/v1/sandboxes", model.RunAnswer, request)

    def sandboxes(self, everything: bool = False) -> list[model.SandboxRow]:
        """The sandboxes; with `everything` also stopped, failed and half-removed ones."""
        path = f"/v1/sandboxes?all={str(everything).lower()}"
        return self._call("GET", path, list[model.SandboxRow])

    def inspect(self, reference: str) -> model.SandboxDetail:
        """One sandbox."""
        return self._call("GET", _sandbox(reference), model.SandboxDetail)

    def remove(self, reference: str, force: bool = False) -> model.RemoveAnswer:
        """Remove a sandbox."""
        path = f"{_sandbox(reference)}?force={str(force).lower()}"
        return self._call("DELETE", path, model.RemoveAnswer)

    def pause(self, reference: str, request: model.CaptureRequest) -> model.CaptureAnswer:
        """Save everything and free the memory."""
        return self._call("POST", _sandbox(reference, "/pause"), model.CaptureAnswer, request)

    def save(self, reference: str, request: model.CaptureRequest) -> model.CaptureAnswer:
        """Take a snapshot of a sandbox that goes on."""
        return self._call("POST", _sandbox(reference, "/snapshots"), model.CaptureAnswer, request)

    def freeze(self, reference: str) -> model.FreezeAnswer:
        """Stop the vCPUs of a running guest; its memory stays."""
        return self._call("POST", _sandbox(reference, "/freeze"), model.FreezeAnswer)

    def thaw(self, reference: str) -> model.FreezeAnswer:
        """Let a frozen guest go on."""
        return self._call("POST", _sandbox(reference, "/thaw"), model.FreezeAnswer)

    def resume(self, reference: str, request: model.ResumeRequest) -> model.ResumeAnswer:
        """Bring a paused sandbox back."""
        return self._call("POST", _sandbox(reference, "/resume"), model.ResumeAnswer, request)

    def restore(self, reference: str, request: model.RestoreRequest) -> model.RestoreAnswer:
        """Put a sandbox back to a snapshot."""
        return self._call("POST", _sandbox(reference, "/restore"), model.RestoreAnswer, request)

    def fork(self, request: model.ForkRequest) -> model.ForkAnswer:
        """Make new sandboxes from a sandbox or a snapshot."""
        return self._call("POST", "/v1/forks", model.ForkAnswer, request)

    def snapshots(self) -> list[model.SnapshotDetail]:
        """All snapshots."""
        return self._call("GET", "/v1/snapshots", list[model.SnapshotDetail])

    def inspect_snapshot(self, reference: str) -> model.SnapshotDetail:
        """One snapshot."""
        return self._call("GET", f"/v1/snapshots/{segment(reference)}", model.SnapshotDetail)

    def remove_snapshot(self, reference: str) -> model.RemoveSnapshotAnswer:
        """Remove a snapshot; its files stay until gc."""
        path = f"/v1/snapshots/{segment(reference)}"
        return self._call("DELETE", path, model.RemoveSnapshotAnswer)

    def gc(self, request: model.GcRequest) -> model.GcAnswer:
        """Delete what nothing refers to."""
        return self._call("POST", "/v1/gc", model.GcAnswer, request)

    def check(self, request: model.CheckRequest) -> model.CheckAnswer:
        """Read everything, and with `repair` make again what can be."""
        return self._call("POST", "/v1/check", model.CheckAnswer, request)

    def verify_snapshot(self, reference: str) -> model.CheckAnswer:
        """Read all that one snapshot is made of."""
        path = f"/v1/snapshots/{segment(reference)}/verify"
        return self._call("POST", path, model.CheckAnswer)

    def df(self) -> model.DfAnswer:
        """What takes the space of the home."""
        return self._call("GET", "/v1/df", model.DfAnswer)

    def pager(self) -> model.PagerAnswer:
        """The processes that serve memory on demand."""
        return self._call("GET", "/v1/pager", model.PagerAnswer)

    def diff_snapshots(self, old: str, new: str) -> model.DiffAnswer:
        """What differs between two snapshots."""
        path = f"/v1/snapshots/{segment(old)}/diff"
        return self._call("POST", path, model.DiffAnswer, model.DiffRequest(other=new))

    def operation(self, operation: str) -> model.OperationAnswer:
        """How far something is that a client asked for."""
        return self._ask("GET", f"/v1/operations/{segment(operation)}", model.OperationAnswer)

    def cancel(self, operation: str) -> model.OperationAnswer:
        """Ask for an operation's end; what it had done is put back. Does not wait for it."""
        return self._ask("DELETE", f"/v1/operations/{segment(operation)}", model.OperationAnswer)

    def logs(
        self, reference: str, follow: bool = False, tail: int | None = None
    ) -> Iterator[bytes]:
        """The guest's console, or its last lines; with `follow` on and on."""
        path = f"{_sandbox(reference, '/logs')}?follow={str(follow).lower()}"
        yield from self._stream(path if tail is None else f"{path}&tail={tail}", follow)

    def events(self, after: int = 0, follow: bool = False) -> Iterator[Event]:
        """What happened after that number; with `follow` on and on."""
        path = f"/v1/events?after={after}&follow={str(follow).lower()}"
        decode = msgspec.json.Decoder(Event).decode
        rest = b""
        for chunk in self._stream(path, follow):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield decode(line)

    def _stream(self, path: str, follow: bool) -> Iterator[bytes]:
        # Following waits as long as the guest is quiet: the daemon's death ends it.
        with self._request("GET", path, None, None if follow else VERB_S) as response:
            if response.status != http.client.OK:
                raise _failure(self.home, response.read(ANSWER_BYTES_MAX))
            try:
                while chunk := response.read1(_READ_BYTES):
                    yield chunk
            except (OSError, http.client.HTTPException) as error:
                raise _gone(self.home, error) from error

    def metrics(self) -> str:
        """Counters and figures, as Prometheus reads them."""
        with self._request("GET", "/metrics", None, VERB_S) as response:
            raw = response.read(ANSWER_BYTES_MAX)
        if response.status != http.client.OK:
            raise _failure(self.home, raw)
        return raw.decode()

    def _call(
        self, method: str, path: str, answer: type[T], body: msgspec.Struct | None = None
    ) -> T:
        """Ask for something; a verb under an operation of its own."""
        if method == "GET":
            return self._ask(method, path, answer)
        operation = os.urandom(8).hex()
        with self._attend(self, operation):
            return self._ask(method, path, answer, body, {"Operation-Id": operation})

    def _ask(
        self,
        method: str,
        path: str,
        answer: type[T],
        body: msgspec.Struct | None = None,
        headers: dict[str, str] | None = None,
    ) -> T:
        encoded = None if body is None else msgspec.json.encode(body)
        with self._request(method, path, encoded, self._bound_s, headers) as response:
            try:
                raw = response.read(ANSWER_BYTES_MAX)
            except (OSError, http.client.HTTPException) as error:
                raise _gone(self.home, error) from error
        if response.status != http.client.OK:
            raise _failure(self.home, raw)
        try:
            return msgspec.json.decode(raw, type=answer)
        except msgspec.DecodeError as error:
            raise DaemonUnreachable(home=self.home.root, cause=f"its answer: {error}") from error

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        bound_s: float | None,
        more: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        headers = {"Connection": "close", **(more or {})}
        if body is not None:
            headers["Content-Type"] = "application/json"

        def attempt(connected: socket.socket) -> http.client.HTTPResponse:
            connected.settimeout(bound_s)
            connection = _Connection(connected)
            connection.request(method, path, body, headers)
            return connection.getresponse()

        try:
            return self.begin(attempt)
        except (OSError, http.client.HTTPException) as error:
            raise _gone(self.home, error) from error


def segment(reference: str) -> str:
    """An id or name as one segment of a path; raises InvalidRequest where it can't be one."""
    if not reference or "/" in reference or len(reference) > limits.REFERENCE_LENGTH_MAX:
        cause = f"it has 1 to {limits.REFERENCE_LENGTH_MAX} characters and no slash"
        raise InvalidRequest(what=f"the id or name {reference[:80]!r}", cause=cause)
    return quote(reference, safe="")


def _sandbox(reference: str, rest: str = "") -> str:
    return f"/v1/sandboxes/{segment(reference)}{rest}"


def _failure(home: Home, raw: bytes) -> DiapauseError:
    try:
        answer: dict[str, dict[str, Any]] = msgspec.json.decode(raw, type=dict[str, dict[str, Any]])
        return from_dict(answer["error"])
    except (msgspec.DecodeError, KeyError):
        return DaemonUnreachable(home=home.root, cause=f"it answered {raw[:200]!r}")


def _gone(home: Home, error: Exception) -> DaemonUnreachable:
    cause = str(error) or type(error).__name__
    if isinstance(error, (http.client.RemoteDisconnected, ConnectionError)):
        cause = "it went away before it answered; what it began, the next one finishes or undoes"
    return DaemonUnreachable(home=home.root, cause=cause)
