"""The client's end of an exec stream.

One thread looks at everything (the socket, stdin, signals) and never blocks on any of it but in
one poll; stdout and stderr have a writer thread each, since a terminal or a pipe that nobody
reads must not keep a signal from the command. Every buffer is bounded: stdin is read only while
there is credit and the last piece is sent, the socket only while both writers have room.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket

import msgspec
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import Event, State
from websockets.uri import parse_uri

from diapause import limits
from diapause.cli.stream_writer import StreamWriter
from diapause.cli.terminal import raw_terminal, size_of_terminal
from diapause.cli.wakeups import Wakeups
from diapause.daemon.client import Client, segment
from diapause.daemon.exec_wire import (
    STDERR,
    STDIN,
    STDIN_WINDOW_BYTES,
    STDOUT,
    Control,
    ExecRequest,
    Report,
)
from diapause.errors import DiapauseError, ExecCut, from_dict
from diapause.units import KIB

_READ_BYTES = 256 * KIB
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WATCHED = select.POLLIN | select.POLLHUP | select.POLLERR


class ExecClient:
    """One command, from its request to its exit code."""

    def __init__(
        self,
        client: Client,
        sandbox: str,
        request: ExecRequest,
        streams: tuple[int, int, int] = (0, 1, 2),
        path: str = "exec",
    ) -> None:
        self._request = request
        self._stdin, stdout, stderr = streams
        self._uri = parse_uri(f"ws://diapause/v1/sandboxes/{segment(sandbox)}/{path}")
        self._outgoing = bytearray()
        self._credit = STDIN_WINDOW_BYTES
        self._stdin_open = request.stdin
        self._wakeups = Wakeups()
        self._writers = {
            STDOUT: StreamWriter(stdout, self._wakeups.wake),
            STDERR: StreamWriter(stderr, self._wakeups.wake),
        }
        self._exit: int | None = None
        self._early: list[Event] = []
        self._socket = client.begin(self._shake_hands)

    def run(self) -> int:
        """Run the command; its exit code. Raises ExecCut, or why it never began."""
        with self._socket:
            return self._run()

    def _run(self) -> int:
        self._begin()
        with raw_terminal(self._request.tty and self._request.stdin):
            try:
                with self._wakeups.handling(self._signals):
                    for event in self._early:
                        self._take_event(event)
                    while self._exit is None:
                        self._turn()
            except DiapauseError:
                self._finish_writing()
                raise
            self._finish_writing()
            self._look_at_writers()
        return self._exit

    def _begin(self) -> None:
        self._send_text(self._request)

    def _finish_writing(self) -> None:
        """Write what had come, however the stream ended; a signal ends this program now."""
        for writer in self._writers.values():
            writer.finish()

    # The handshake.

    def _shake_hands(self, connected: socket.socket) -> socket.socket:
        self._protocol = ClientProtocol(self._uri, max_size=limits.REQUEST_BODY_BYTES_MAX)
        self._protocol.send_request(self._protocol.connect())
        connected.sendall(b"".join(self._protocol.data_to_send()))
        while True:
            try:
                data = connected.recv(_READ_BYTES)
            except TimeoutError as error:
                raise ExecCut(cause="the daemon does not answer") from error
            if not data:
                raise ExecCut(cause="the daemon went away before the command began")
            self._protocol.receive_data(data)
            events = self._protocol.events_received()
            if self._protocol.handshake_exc is not None:
                raise ExecCut(cause=f"the daemon refused: {self._protocol.handshake_exc}")
            if events:
                assert isinstance(events[0], Response)
                self._early = events[1:]  # a refusal may come with the handshake
                connected.setblocking(False)
                return connected

    # One turn of the loop.

    def _turn(self) -> None:
        ready = dict(self._poll())
        if self._wakeups.readable in ready:
            self._wakeups.drain()
        self._pass_signals_on()
        self._look_at_writers()
        if ready.get(self._socket.fileno(), 0) & _WATCHED:
            self._receive()
        if self._stdin in ready and self._is_open:
            self._read_stdin()
        self._send()

    def _poll(self) -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(self._wakeups.readable, select.POLLIN)
        interest = select.POLLOUT if self._outgoing else 0
        if all(writer.has_room for writer in self._writers.values()):
            interest |= select.POLLIN
        # Without interest a socket still reports that its other end is gone, again and again.
        if interest:
            poll.register(self._socket.fileno(), interest)
        if self._stdin_open and self._credit > 0 and not self._outgoing:
            poll.register(self._stdin, select.POLLIN)
        # Nothing to time out on: a command may be silent for as long as it likes, and whatever
        # ends the stream (the daemon's death too) is an event.
        return poll.poll()

    @property
    def _is_open(self) -> bool:
        """Whether the daemon still listens: not once it has said its last word."""
        return self._protocol.state is State.OPEN

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise ExecCut(cause=f"the daemon went away: {error}") from error
        if not data:
            raise ExecCut(cause="the daemon went away")
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            self._take_event(event)
        self._outgoing += b"".join(self._protocol.data_to_send())
        if self._protocol.parser_exc is not None:
            raise ExecCut(cause=f"the stream is malformed: {self._protocol.parser_exc}")

    def _take_event(self, event: Event) -> None:
        if isinstance(event, Frame):
            self._take(event)

    def _take(self, frame: Frame) -> None:
        if frame.opcode is Opcode.BINARY and frame.fin:
            writer = self._writers.get(frame.data[0] if frame.data else STDIN)
            if writer is None:
                raise ExecCut(cause="the daemon sent a stream that there is not")
            writer.put(memoryview(frame.data)[1:])
        elif frame.opcode is Opcode.TEXT and frame.fin:
            self._obey(bytes(frame.data))
        elif frame.opcode is Opcode.CLOSE and self._exit is None:
            raise ExecCut(cause="the daemon closed the stream before the command ended")
        elif frame.opcode is Opcode.CONT or not frame.fin:
            raise ExecCut(cause="the daemon sent a message in pieces")

    def _obey(self, text: bytes) -> None:
        try:
            report = msgspec.json.decode(text, type=Report)
        except msgspec.DecodeError as error:
            raise ExecCut(cause=f"the daemon sent a malformed report: {error}") from error
        if report.error is not None:
            raise from_dict(report.error)
        self._credit += report.credit or 0
        if report.exit is not None:
            self._exit = report.exit

    def _read_stdin(self) -> None:
        want = min(limits.EXEC_MESSAGE_BYTES_MAX, self._credit)
        try:
            data = os.read(self._stdin, want)
        except BlockingIOError:
            return
        except OSError as error:
            # A terminal that was taken away, or a stdin that was never open, has ended.
            if error.errno not in (errno.EIO, errno.EBADF):
                raise ExecCut(cause=f"reading stdin: {error.strerror}") from error
            data = b""
        self._stdin_open = bool(data)
        self._credit -= len(data)
        self._protocol.send_binary(bytes([STDIN]) + data)
        self._outgoing += b"".join(self._protocol.data_to_send())

    def _send(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except BlockingIOError:
                return
            except OSError as error:
                # What the daemon said before it closed is still to be read, and says more.
                if error.errno in (errno.EPIPE, errno.ECONNRESET):
                    self._outgoing.clear()
                    self._stdin_open = False
                    return
                raise ExecCut(cause=f"the daemon went away: {error}") from error
            del self._outgoing[:sent]

    def _send_text(self, message: ExecRequest | Control) -> None:
        if self._is_open:
            self._protocol.send_text(msgspec.json.encode(message))
            self._outgoing += b"".join(self._protocol.data_to_send())

    # Signals and writers.

    @property
    def _signals(self) -> list[int]:
        return [*_FORWARDED, *([signal.SIGWINCH] if self._request.tty else [])]

    def _pass_signals_on(self) -> None:
        for number in self._wakeups.take_signals():
            if number == signal.SIGWINCH:
                self._send_text(Control(resize=size_of_terminal()))
            elif self._request.tty:
                # The terminal's own keys are the command's; a signal from elsewhere is for us.
                raise SystemExit(128 + number)
            else:
                self._send_text(Control(signal=number))

    def _look_at_writers(self) -> None:
        """A reader that went away is for the command what it is locally: SIGPIPE."""
        for writer in self._writers.values():
            failure = writer.take_failure()
            if isinstance(failure, BrokenPipeError):
                self._send_text(Control(signal=signal.SIGPIPE))
            elif failure is not None:
                raise ExecCut(cause=f"writing its output: {failure.strerror}") from failure
