"""A guest's console as a session: what it prints, and what is typed on it.

What the guest prints is always taken, so that a client that does not read never makes the guest
wait; beyond a bound it is left out, and that is said. The log has all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from diapause.errors import ExecCut
from diapause.guest.session import Output
from diapause.limits import QMP_CONNECT_S
from diapause.units import KIB, MIB

WAITING_BYTES_MAX = 1 * MIB
_READ_BYTES = 64 * KIB


class ConsoleSession:
    """One client at a guest's console; there is one at a time."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ended: Callable[[], None],
    ) -> None:
        self._reader, self._writer, self._ended = reader, writer, ended
        self._waiting = bytearray()
        self._left_out_bytes = 0
        self._is_over = False
        self._changed = asyncio.Event()
        self._taking = asyncio.create_task(self._take())

    async def _take(self) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await self._reader.read(_READ_BYTES):
                    if len(self._waiting) + len(data) > WAITING_BYTES_MAX:
                        self._left_out_bytes += len(data)
                    else:
                        self._waiting += data
                    self._changed.set()
        finally:
            self._is_over = True
            self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Output]:
        """What the guest prints; raises ExecCut when its VMM is gone."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._waiting:
                data = bytes(self._waiting[:_READ_BYTES])
                del self._waiting[:_READ_BYTES]
                yield Output(1, data)
            if left_out := self._left_out_bytes:
                self._left_out_bytes = 0
                yield Output(2, f"[{left_out} bytes left out]\r\n".encode())
            if self._is_over and not self._waiting:
                raise ExecCut(cause="the guest was paused or has ended; its console went with it")

    async def write(self, data: bytes) -> None:
        """Type; returns when there is room for more. A guest that does not read takes no more."""
        self._writer.write(data)
        with contextlib.suppress(OSError):  # its output says that it is gone
            await self._writer.drain()

    async def end_input(self) -> None:
        """A console has no end of input."""

    async def signal(self, number: int) -> None:
        """A console knows keys, not signals."""

    async def resize(self, rows: int, cols: int) -> None:
        """A serial console does not know its size."""

    def abandon(self) -> None:
        """Leave the console to the next one."""
        self._taking.cancel()
        self._writer.close()
        self._ended()


async def open_console(path: Path, ended: Callable[[], None]) -> ConsoleSession:
    """Connect to the VMM's console socket; raises OSError where there is none, TimeoutError."""
    opened = asyncio.open_unix_connection(str(path), limit=_READ_BYTES)
    reader, writer = await asyncio.wait_for(opened, QMP_CONNECT_S)
    return ConsoleSession(reader, writer, ended)
