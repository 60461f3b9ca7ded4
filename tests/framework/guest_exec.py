"""Commands in a guest over the daemon's exec stream: what the command line does, in process."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from typing import TYPE_CHECKING

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from diapause.daemon.exec_wire import STDERR, STDIN, STDOUT, ExecRequest, Report
from diapause.daemon.start import connect as connect_daemon
from diapause.errors import ExecCut, from_dict
from diapause.units import KIB

if TYPE_CHECKING:
    from diapause.daemon.client import Client

# A busy host under emulation: a guest that says nothing for so long is stuck.
SILENCE_S = 180.0
_STDIN_BYTES = 32 * KIB


class Stream:
    """One command from its request to its exit; output is collected as it comes."""

    def __init__(
        self, client: Client, sandbox: str, argv: list[str], given: bytes | None = None
    ) -> None:
        self.output = {STDOUT: bytearray(), STDERR: bytearray()}
        self.exit: int | None = None
        self._scope = contextlib.ExitStack()
        self._socket = self._scope.enter_context(
            connect(
                f"ws://diapause/v1/sandboxes/{sandbox}/exec",
                sock=connect_daemon(client.home, client._command),
                compression=None,
                max_size=None,
                proxy=None,
                open_timeout=SILENCE_S,
            )
        )
        request = ExecRequest(argv=argv, stdin=given is not None)
        self._socket.send(msgspec.json.encode(request).decode())
        if given is not None:
            # A stream that failed meanwhile is closed; why, is the last message that it holds.
            with contextlib.suppress(ConnectionClosed):
                for at in range(0, len(given), _STDIN_BYTES):
                    self._socket.send(bytes([STDIN]) + given[at : at + _STDIN_BYTES])
                self._socket.send(bytes([STDIN]))

    @property
    def out(self) -> bytes:
        """What the command has written so far."""
        return bytes(self.output[STDOUT])

    def step(self) -> None:
        """Take one message; raises the daemon's error, or ExecCut where the stream ended."""
        try:
            message = self._socket.recv(SILENCE_S)
        except ConnectionClosed as error:
            raise ExecCut(cause="the daemon closed the stream") from error
        if isinstance(message, bytes):
            self.output[message[0]] += message[1:]
            return
        report = msgspec.json.decode(message, type=Report)
        if report.error is not None:
            raise from_dict(report.error)
        self.exit = report.exit

    def finish(self) -> subprocess.CompletedProcess[bytes]:
        """Take all there is, up to the command's exit code."""
        try:
            while self.exit is None:
                self.step()
        finally:
            self._scope.close()
        out, err = (bytes(self.output[number]) for number in (STDOUT, STDERR))
        return subprocess.CompletedProcess([], self.exit, out, err)

    def close(self) -> None:
        """Leave the command to itself."""
        self._scope.close()


class Follower:
    """A stream that a thread reads, so that it can be looked at while the guest is paused."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while self.stream.exit is None:
                self.stream.step()
        except Exception as error:  # noqa: BLE001 - whoever looks is told
            self.failure = error

    @property
    def lines(self) -> list[str]:
        """The whole lines that have come."""
        return self.stream.out.decode().split("\n")[:-1]

    def close(self) -> None:
        """Leave the command, and wait for the reader."""
        self.stream.close()
        self._thread.join(SILENCE_S)
