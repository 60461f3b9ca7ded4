"""Events as a stream of JSON lines.

They are read from the catalog in pieces of a bounded number, in worker threads: a client that reads
slowly holds up nobody, and one that comes back with the last number it has misses nothing that is
still kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from diapause.model import Event

MEDIA_TYPE = "application/jsonl"
EVENTS_AT_ONCE = 500
FOLLOW_EVERY_S = 0.1

ReadEvents = Callable[[int, int], list[Event]]


def event_stream(read: ReadEvents, request: Request, after: int, follow: bool) -> Response:
    """The events after that number; with `follow` on and on."""
    return StreamingResponse(_lines(read, request, after, follow), media_type=MEDIA_TYPE)


async def _lines(
    read: ReadEvents, request: Request, after: int, follow: bool
) -> AsyncIterator[bytes]:
    encode = msgspec.json.Encoder().encode
    while True:
        found = await asyncio.to_thread(read, after, EVENTS_AT_ONCE)
        if found:
            after = found[-1].sequence
            yield b"".join(encode(event) + b"\n" for event in found)
        elif not follow or await request.is_disconnected():
            return
        else:
            await asyncio.sleep(FOLLOW_EVERY_S)
