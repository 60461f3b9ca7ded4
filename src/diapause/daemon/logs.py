"""The guest's console as a stream of bytes, over its rotation.

A console is `console.log` and, once that was full, `console.log.1` with what came before. Whether
the file is renamed or copied and cut at a rotation, a reader that follows first takes the rest from
`console.log.1` and then begins the new file.

Reads are of a bounded size, at offsets of our own, in worker threads. A directory that is gone ends
the stream, and so does a client that left; a file that is missing does not, since between the two
steps of a rotation there is none.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from diapause.units import KIB

READ_BYTES = 64 * KIB
FOLLOW_EVERY_S = 0.1


def console(path: Path, request: Request, follow: bool, tail: int | None = None) -> Response:
    """Stream the console as it is now, or with `follow` as it becomes; all, or its last lines."""
    chunks = _chunks(Console(path, tail), request, follow)
    return StreamingResponse(chunks, media_type="application/octet-stream")


async def _chunks(reader: Console, request: Request, follow: bool) -> AsyncIterator[bytes]:
    try:
        # Without follow the stream ends where the console ended when it was asked for, so that a
        # guest that writes faster than the client reads can't make it endless.
        left = await asyncio.to_thread(reader.start)
        while follow or left > 0:
            chunk = await asyncio.to_thread(reader.read, READ_BYTES if follow else left)
            if chunk is None:
                return
            left -= len(chunk)
            if chunk:
                yield chunk
            elif not follow or await request.is_disconnected():
                return
            else:
                await asyncio.sleep(FOLLOW_EVERY_S)
    finally:
        reader.close()


class Console:
    """A place in a console; one thread at a time."""

    def __init__(self, path: Path, tail: int | None = None) -> None:
        self._path, self._before, self._tail = path, path.with_name(f"{path.name}.1"), tail
        self._file, self._offset = -1, 0
        self._is_present = True  # whether it is the file that the console is written to
        self._rotated: tuple[int, int] | None = None  # the older file, when this one was opened

    def start(self) -> int:
        """Go to where reading begins; how many bytes there are from there on."""
        sizes = [_size(self._before), _size(self._path)]
        skipped = 0 if self._tail is None else sum(sizes) - self._tail_bytes()
        if skipped >= sizes[0]:
            self._open(self._path, skipped - sizes[0])
        else:
            self._open(self._before, skipped)
        return sum(sizes) - skipped

    def read(self, count: int) -> bytes | None:
        """The next bytes; none where nothing is new, None where the console is gone."""
        if self._file < 0 and not self._open(self._path, 0):
            return self._nothing()
        self._follow_rotation()
        if data := os.pread(self._file, min(count, READ_BYTES), self._offset):
            self._offset += len(data)
            return data
        return self._next(count)

    def _follow_rotation(self) -> None:
        """Go on in the file that what we read was copied to; one that was renamed we hold open."""
        before = _identity(self._before)
        if not self._is_present or before == self._rotated:
            return
        if before == _identity(self._file):
            self._is_present = False
        elif before is not None:
            self._open(self._before, self._offset)

    def _next(self, count: int) -> bytes | None:
        """At the end of a file: the older of the two, or one that nothing is added to just now."""
        if not self._is_present:
            return self.read(count) if self._open(self._path, 0) else self._nothing()
        if _identity(self._path) is None:
            return self._nothing()
        if os.fstat(self._file).st_size < self._offset:
            self._offset = 0  # cut, and nothing was kept
        return b""

    def _nothing(self) -> bytes | None:
        """What is read where there is no file: a rotation puts one back, a removal does not."""
        return b"" if self._path.parent.exists() else None

    def _open(self, path: Path, offset: int) -> bool:
        rotated = _identity(self._before)
        try:
            fresh = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        self.close()
        self._file, self._offset = fresh, offset
        self._is_present, self._rotated = path == self._path, rotated
        return True

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _tail_bytes(self) -> int:
        """How many bytes the last lines take, over both files."""
        assert self._tail is not None
        wanted, found = self._tail, 0
        if wanted == 0:
            return 0
        for block in _backwards(self._path, self._before):
            last = not found  # the line end that the console ends with begins no line
            at = len(block) - 1 if last and block.endswith(b"\n") else len(block)
            while wanted and (at := block.rfind(b"\n", 0, at)) >= 0:
                wanted -= 1
            if not wanted:
                return found + len(block) - at - 1
            found += len(block)
        return found


def _backwards(*paths: Path) -> Iterator[bytes]:
    """Blocks of the files from the end of the first on."""
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                end = os.fstat(file.fileno()).st_size
                while end > 0:
                    begin = max(0, end - READ_BYTES)
                    yield os.pread(file.fileno(), end - begin, begin)
                    end = begin
        except FileNotFoundError:
            continue


def _identity(file: Path | int) -> tuple[int, int] | None:
    try:
        status = os.fstat(file) if isinstance(file, int) else file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
