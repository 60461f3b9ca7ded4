"""What the host has to send on a link: numbered frames, kept until the agent acknowledges them.

Frames leave in order and without a gap, again after a cut. Data is only queued while there is
room, so at most the window of it waits here; what is not data (credit, signals) is small and
always taken, up to a number that only an agent reaches that acknowledges nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice

from diapause.guest.frames import Frame
from diapause.guest.protocol import HEADER_LEN, ProtocolError
from diapause.units import MIB

WINDOW = 1 * MIB
FRAMES_MAX = 32_768  # an agent that keeps to the protocol leaves a few per stream


class Outbox:
    """Numbered frames on their way to the agent."""

    def __init__(self) -> None:
        self._frames: deque[Frame] = deque()
        self._next = 0  # index of the first frame that has not left on this connection
        self._last_seq = 0
        self._bytes = 0
        self._room = asyncio.Event()
        self._room.set()

    @property
    def has_room(self) -> bool:
        """Whether data may be queued."""
        return self._bytes < WINDOW

    @property
    def is_full(self) -> bool:
        """Whether so much waits that the agent must be one that acknowledges nothing."""
        return len(self._frames) >= FRAMES_MAX

    async def wait_for_room(self) -> None:
        """Returns when data may be queued, or when whoever waits should look again."""
        if not self.has_room:
            self._room.clear()
        await self._room.wait()

    def wake(self) -> None:
        """Makes all who wait for room look again."""
        self._room.set()

    def push(self, kind: int, session: int, payload: bytes, flags: int = 0) -> None:
        """Queues a frame."""
        self._last_seq += 1
        self._frames.append(Frame(kind, flags, session, self._last_seq, 0, payload))
        self._bytes += len(payload) + HEADER_LEN

    def take(self) -> Frame | None:
        """The next frame to leave."""
        if self._next == len(self._frames):
            return None
        frame = self._frames[self._next]
        self._next += 1
        return frame

    def acknowledge(self, ack: int) -> None:
        """Forgets what the agent has; raises ProtocolError if it can't have it."""
        count = ack - self._first_seq + 1
        if count > self._next:
            raise ProtocolError("an acknowledgement of what was never sent")
        if count > 0:
            self._drop(count)
            self._next -= count

    def rewind(self, received: int) -> None:
        """Begins again behind `received`, on a new connection of the same link."""
        count = received - self._first_seq + 1
        if count < 0 or received > self._last_seq:
            raise ProtocolError("a place in the stream where it can't be")
        self._drop(count)
        self._next = 0

    def reset(self) -> None:
        """Forgets everything: the agent does not know this link any more."""
        self._frames.clear()
        self._next = self._last_seq = self._bytes = 0
        self._room.set()

    @property
    def _first_seq(self) -> int:
        return self._last_seq + 1 - len(self._frames)

    def _drop(self, count: int) -> None:
        for frame in islice(self._frames, count):
            self._bytes -= len(frame.payload) + HEADER_LEN
        for _ in range(count):
            self._frames.popleft()
        if self.has_room:
            self._room.set()
