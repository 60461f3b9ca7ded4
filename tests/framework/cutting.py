"""A proxy between a link and its agent that loses the connection at any byte.

What a pause does to the stream: bytes that are on their way are gone, in both directions, and the
rest of the frame that they belonged to never comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from tests.framework.agent import Agent


class CuttingProxy:
    """Forwards a given number of bytes, drops the rest of what it holds, and hangs up."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._left = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[socket.socket] = []
        self.cut = asyncio.Event()

    async def connect(self, after_bytes: int) -> socket.socket:
        """A socket for a link; it is cut when about so many bytes have gone through."""
        loop = asyncio.get_running_loop()
        far = await self._agent.connect()
        ours, theirs = socket.socketpair()
        for sock in (far, theirs):
            sock.setblocking(False)
        self._sockets = [far, theirs]
        self.cut = asyncio.Event()
        self._left = after_bytes
        self._tasks = [
            loop.create_task(self._forward(far, theirs)),
            loop.create_task(self._forward(theirs, far)),
        ]
        return ours

    async def _forward(self, source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(source, 65536):
                passed = min(len(data), max(self._left, 0))
                self._left -= len(data)
                await loop.sock_sendall(target, data[:passed])
                if self._left <= 0:
                    break
        self.cut.set()

    async def hang_up(self) -> None:
        """Drops whatever is on its way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.close()
