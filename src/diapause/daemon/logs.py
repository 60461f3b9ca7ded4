"""The guest's console as a stream of bytes.

Reads are of a bounded size, at offsets of our own, in worker threads; a file that shrank is read
from its start again, one that is gone ends the stream, and so does a client that left.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from diapause.units import KIB

READ_BYTES = 64 * KIB
FOLLOW_EVERY_S = 0.1


def console(path: Path, request: Request, follow: bool) -> Response:
    """Stream the file as it is now, or with `follow` as it becomes."""
    return StreamingResponse(_chunks(path, request, follow), media_type="application/octet-stream")


async def _chunks(path: Path, request: Request, follow: bool) -> AsyncIterator[bytes]:
    offset = 0
    # Without follow the stream ends where the file ended when it was asked for, so that a guest
    # that writes faster than the client reads can't make it endless.
    end = None if follow else await asyncio.to_thread(_size, path)
    while True:
        size = await asyncio.to_thread(_size, path)
        if size is None:
            return
        offset = 0 if size < offset else offset
        want = READ_BYTES if end is None else min(READ_BYTES, end - offset)
        chunk = await asyncio.to_thread(_read, path, offset, want)
        if chunk:
            offset += len(chunk)
            yield chunk
        elif not follow or await request.is_disconnected():
            return
        else:
            await asyncio.sleep(FOLLOW_EVERY_S)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _read(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), max(size, 0), offset)
    except FileNotFoundError:
        return b""
