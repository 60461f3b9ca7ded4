"""A connected socket in the event loop: reads into a buffer, writes whole messages in order.

Nothing waits and nothing is raised out of a callback: a socket that fails is reported once through
`gone`. A message that did not fit is finished before the next begins.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

Message = Sequence[bytes | memoryview]


class Wire:
    """One connection."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        space: Callable[[], memoryview],
        arrived: Callable[[int], None],
        next_message: Callable[[], Message | None],
        gone: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._space = space
        self._arrived = arrived
        self._next_message = next_message
        self._gone = gone
        self._rest: list[bytes | memoryview] = []  # of a message that has begun to leave
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._blocked = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self) -> None:
        """Writes what there is until it would block; goes on by itself after that."""
        while self._open and not self._blocked:
            if not self._rest:
                message = self._next_message()
                if message is None:
                    return
                self._rest = [part for part in message if len(part)]
            self._write()

    def close(self) -> None:
        """Ends the connection; nothing is called back after it."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock.fileno())
        if self._blocked:
            self._loop.remove_writer(self._sock.fileno())
        self._sock.close()

    def _write(self) -> None:
        try:
            count = self._sock.sendmsg(self._rest)
        except (BlockingIOError, InterruptedError):
            self._blocked = True
            self._loop.add_writer(self._sock.fileno(), self._writable)
            return
        except OSError as error:
            self._fail(str(error))
            return
        while self._rest and count >= len(self._rest[0]):
            count -= len(self._rest.pop(0))
        if count:
            self._rest[0] = memoryview(self._rest[0])[count:]

    def _writable(self) -> None:
        self._blocked = False
        self._loop.remove_writer(self._sock.fileno())
        self.send()

    def _readable(self) -> None:
        try:
            count = self._sock.recv_into(self._space())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(str(error))
            return
        if count == 0:
            self._fail("the VMM closed the agent's channel")
            return
        self._arrived(count)

    def _fail(self, cause: str) -> None:
        self.close()
        self._gone(cause)
