"""One command in the guest, as the host sees it.

Its streams are never silently short: iteration ends with an `Exit` after all output, or raises.
At most the window that the agent was granted waits here unread, in a bounded number of pieces. A
session that its link lost (`cut`) first yields what had come, then raises.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from diapause import errors
from diapause.guest import protocol
from diapause.guest.protocol import GRANT_STEP, PAYLOAD_MAX, STREAM_WINDOW, Exec, ProtocolError

ExecRequest = Exec
EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126
_ENOENT = 2
_ERRNO_END = 4096
_PIECES_MAX = 1024  # above it, new output joins older output of its stream


class Output(msgspec.Struct, frozen=True):
    """Bytes from the command: stream 1 is output (or the terminal), 2 is errors."""

    stream: int
    data: bytes


class Exit(msgspec.Struct, frozen=True):
    """The command's end: 128 + signal if a signal ended it, 127 and 126 if it could not start."""

    code: int
    signal: int | None = None


class Channel(Protocol):
    """What a session needs of its link."""

    sandbox: str

    def push(self, kind: int, session: int, payload: bytes = b"") -> None:
        """Queues a frame."""

    async def wait_for_room(self) -> None:
        """Returns when data may be queued or the session should look again."""

    @property
    def has_room(self) -> bool:
        """Whether data may be queued."""

    def wake_writers(self) -> None:
        """Makes writers that wait for room look again at their session."""

    def forget(self, session: int) -> None:
        """The session is over or abandoned."""


class _Piece:
    __slots__ = ("data", "stream")

    def __init__(self, stream: int, data: bytearray) -> None:
        self.stream = stream
        self.data = data


class Session:
    """A command that runs; one reader and one writer at a time."""

    def __init__(self, link: Channel, number: int, request: ExecRequest) -> None:
        self.number = number
        self.pid: int | None = None
        self.abandoned = False
        self._link = link
        self._program = request.argv[0]
        self._input_open = request.stdin or request.tty
        self._credit = STREAM_WINDOW
        self._credited = asyncio.Event()
        self._pieces: deque[_Piece] = deque()
        self._newest: dict[int, _Piece] = {}
        self._owed = {1: STREAM_WINDOW, 2: STREAM_WINDOW}  # what the agent may still send
        self._consumed = {1: 0, 2: 0}
        self._arrived = asyncio.Event()
        self._end: Exit | errors.DiapauseError | None = None
        self._over = False

    # What the client does.

    async def write(self, data: bytes) -> None:
        """Sends input; waits while the command does not read; dropped once it has closed it."""
        rest = memoryview(data)
        while len(rest) and await self._may_write():
            count = min(len(rest), self._credit, PAYLOAD_MAX)
            self._credit -= count
            self._link.push(protocol.STDIN, self.number, bytes(rest[:count]))
            rest = rest[count:]

    async def end_input(self) -> None:
        """Ends the command's input; on a terminal it types the end-of-input character."""
        self._raise_if_cut()
        if self._input_open and self._end is None:
            self._input_open = False
            self._link.push(protocol.STDIN_EOF, self.number)

    async def signal(self, number: int) -> None:
        """Sends the command's process group a signal."""
        self._raise_if_cut()
        if self._end is None:
            payload = msgspec.json.encode(protocol.Signal(number=number))
            self._link.push(protocol.SIGNAL, self.number, payload)

    async def resize(self, rows: int, cols: int) -> None:
        """Gives the command's terminal a new size."""
        self._raise_if_cut()
        if self._end is None:
            payload = msgspec.json.encode(protocol.Resize(rows=rows, cols=cols))
            self._link.push(protocol.RESIZE, self.number, payload)

    def abandon(self) -> None:
        """The client went away: the command goes on, unheard."""
        self._over = True
        self._pieces.clear()
        self._newest.clear()
        if self._end is None:
            self.abandoned = True
            self._end = errors.ExecCut(cause="its client went away")
            self._link.push(protocol.CLOSE, self.number)
            self._link.forget(self.number)
        self._wake()

    def __aiter__(self) -> AsyncIterator[Output | Exit]:
        return self

    async def __anext__(self) -> Output | Exit:
        while not self._pieces:
            if self._over:
                raise StopAsyncIteration
            if isinstance(self._end, errors.DiapauseError):
                raise self._end
            if self._end is not None:
                self._over = True
                return self._end
            self._arrived.clear()
            await self._arrived.wait()
        piece = self._pieces.popleft()
        if self._newest.get(piece.stream) is piece:
            del self._newest[piece.stream]
        self._consume(piece.stream, len(piece.data))
        return Output(piece.stream, bytes(piece.data))

    # What the link does.

    def take(self, kind: int, payload: bytes | memoryview) -> None:
        """Acts on a frame of this session; raises ProtocolError."""
        if kind in (protocol.STDOUT, protocol.STDERR):
            self._take_output(1 if kind == protocol.STDOUT else 2, payload)
        elif kind == protocol.CREDIT:
            self._take_credit(payload)
        elif kind == protocol.STARTED:
            self.pid = protocol.decode_json(payload, protocol.Started).pid
        elif kind == protocol.STDIN_CLOSED:
            self._input_open = False
            self._credited.set()
            self._link.wake_writers()
        elif kind == protocol.EXIT:
            self._take_exit(payload)
        elif kind == protocol.EXEC_FAILED:
            self._take_failure(protocol.decode_json(payload, protocol.ExecFailed))

    def cut(self, cause: str) -> None:
        """The link lost this session."""
        self._finish(errors.ExecCut(cause=cause))

    async def _may_write(self) -> bool:
        while True:
            self._raise_if_cut()
            if self._end is not None or not self._input_open:
                return False
            if self._credit > 0 and self._link.has_room:
                return True
            if self._credit > 0:
                await self._link.wait_for_room()
            else:
                self._credited.clear()
                await self._credited.wait()

    def _raise_if_cut(self) -> None:
        if isinstance(self._end, errors.DiapauseError):
            raise self._end

    def _take_output(self, stream: int, payload: bytes | memoryview) -> None:
        self._owed[stream] -= len(payload)
        if self._owed[stream] < 0:
            raise ProtocolError("more output than it was granted")
        newest = self._newest.get(stream)
        latest = self._pieces[-1] if self._pieces else None
        joins = newest is not None and (latest is newest or len(self._pieces) >= _PIECES_MAX)
        if joins and newest is not None and len(newest.data) + len(payload) <= PAYLOAD_MAX:
            newest.data += payload
        else:
            piece = _Piece(stream, bytearray(payload))
            self._newest[stream] = piece
            self._pieces.append(piece)
        self._arrived.set()

    def _consume(self, stream: int, count: int) -> None:
        self._consumed[stream] += count
        if self._end is None and self._consumed[stream] >= GRANT_STEP:
            grant = self._consumed[stream]
            self._consumed[stream] = 0
            self._owed[stream] += grant
            self._link.push(protocol.CREDIT, self.number, protocol.encode_credit(stream, grant))

    def _take_credit(self, payload: bytes | memoryview) -> None:
        stream, count = protocol.decode_credit(payload)
        if stream != 0 or self._credit + count > STREAM_WINDOW:
            raise ProtocolError("credit for what was never sent")
        self._credit += count
        self._credited.set()

    def _take_exit(self, payload: bytes | memoryview) -> None:
        exited = protocol.decode_json(payload, protocol.Exited)
        if not 0 <= exited.code <= 255 or not 0 <= (exited.signal or 0) <= 127:
            raise ProtocolError("an exit code that is none")
        self._finish(Exit(exited.code, exited.signal))

    def _take_failure(self, failed: protocol.ExecFailed) -> None:
        if not 0 < failed.errno < _ERRNO_END:
            raise ProtocolError("an error number that is none")
        if failed.what in ("limit", "request", "system"):
            cause = protocol.clean_text(failed.message)
            refused = errors.AgentRefused(sandbox=self._link.sandbox, what="an exec", cause=cause)
            self._finish(refused)
            return
        code = EXIT_NOT_FOUND if failed.errno == _ENOENT else EXIT_NOT_EXECUTABLE
        what = "the working directory" if failed.what == "directory" else self._program
        text = f"diapause: exec: {what}: {os.strerror(failed.errno)}\n"
        self._pieces.append(_Piece(2, bytearray(text.encode())))
        self._finish(Exit(code))

    def _finish(self, end: Exit | errors.DiapauseError) -> None:
        if self._end is None:
            self._end = end
            self._link.forget(self.number)
            self._wake()

    def _wake(self) -> None:
        self._arrived.set()
        self._credited.set()
        self._link.wake_writers()
