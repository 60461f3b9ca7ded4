"""Frames on the wire: their header, their checksum, and the decoder that finds them.

The decoder has one buffer of fixed size and checks every length before it waits for it. Until the
WELCOME that is waited for it throws away whatever else comes; after it, every byte has to be part
of a frame, but for zero bytes between frames. Nothing here does I/O.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from diapause.guest import protocol
from diapause.guest.protocol import (
    FRAME_MAX,
    HEADER_LEN,
    MAGIC,
    PAYLOAD_MAX,
    ProtocolError,
    Welcome,
)
from diapause.units import KIB

_HEADER = struct.Struct("<4sBBHIIQQI")
_CRC = struct.Struct("<I")
_WELCOME_PREFIX = MAGIC + bytes([protocol.WELCOME])
_WELCOME_MAX = 4 * KIB
_ZEROS = bytes(KIB)


class LostPlaceError(Exception):
    """The stream makes no sense at this byte; a new HELLO finds the place again."""


class Frame(NamedTuple):
    """One frame; its payload may be a view that is only good until the next read."""

    kind: int
    flags: int
    session: int
    seq: int
    ack: int
    payload: bytes | memoryview


class _Header(NamedTuple):
    kind: int
    flags: int
    length: int
    session: int
    seq: int
    ack: int
    crc: int


def encode_header(frame: Frame) -> bytes:
    """The header of a frame, checksum included."""
    kind, flags, session, seq, ack, payload = frame
    head = _HEADER.pack(MAGIC, kind, flags, 0, len(payload), session, seq, ack, 0)[:-4]
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head)))


def encode(frame: Frame) -> bytes:
    """A whole frame."""
    return encode_header(frame) + frame.payload


def unnumbered(kind: int, payload: bytes = b"", ack: int = 0) -> bytes:
    """A whole frame that belongs to the connection and is not retransmitted."""
    return encode(Frame(kind, 0, 0, 0, ack, payload))


class Decoder:
    """Finds frames in the stream from the guest."""

    def __init__(self, size: int = 256 * KIB) -> None:
        assert size >= 2 * FRAME_MAX
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty once the frames before were taken."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < FRAME_MAX:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def fill(self, count: int) -> None:
        """Says that `count` bytes were put there."""
        self._end += count

    def clear(self) -> None:
        """Forgets everything, as for a new connection."""
        self._start = self._end = 0

    def frames(self) -> Iterator[Frame]:
        """The whole frames that are there; raises LostPlaceError at a byte that begins none."""
        while True:
            self._skip_zeros()
            if self._end - self._start < HEADER_LEN:
                return
            header = self._header(self._start)
            if header is None:
                raise LostPlaceError("no frame begins here")
            total = HEADER_LEN + header.length
            if self._end - self._start < total:
                return
            frame = self._checked(self._start, header)
            if frame is None:
                raise LostPlaceError("a frame's checksum is wrong")
            self._start += total
            yield frame

    def find_welcome(self, nonce: str) -> Welcome | None:
        """Throws bytes away up to the WELCOME that answers `nonce`, and takes it."""
        keep = (
            None  # where a WELCOME begins that has not come whole; half a stale one looks the same
        )
        at = self._start
        while (at := self._buffer.find(_WELCOME_PREFIX, at, self._end)) >= 0:
            header = self._header(at) if self._end - at >= HEADER_LEN else None
            total = HEADER_LEN + (header.length if header else 0)
            if header is not None and header.length <= _WELCOME_MAX and self._end - at >= total:
                welcome = self._welcome(at, header)
                if welcome is not None and welcome.nonce == nonce:
                    self._start = at + total
                    return welcome
            elif keep is None and self._end - at < HEADER_LEN + _WELCOME_MAX:
                keep = at
            at += 1
        # The prefix itself may lie across the end of what has come so far.
        last = max(self._start, self._end - len(_WELCOME_PREFIX) + 1)
        self._start = last if keep is None else keep
        return None

    def _welcome(self, at: int, header: _Header) -> Welcome | None:
        frame = self._checked(at, header)
        if frame is None:
            return None
        try:
            return protocol.decode_json(frame.payload, Welcome)
        except ProtocolError:
            return None

    def _skip_zeros(self) -> None:
        buffer, start, end = self._buffer, self._start, self._end
        while start < end and buffer[start] == 0:
            start += len(_ZEROS) if buffer.startswith(_ZEROS, start, end) else 1
        self._start = start

    def _header(self, at: int) -> _Header | None:
        magic, kind, flags, reserved, length, session, seq, ack, crc = _HEADER.unpack_from(
            self._buffer, at
        )
        if magic != MAGIC or reserved != 0 or length > PAYLOAD_MAX:
            return None
        return _Header(kind, flags, length, session, seq, ack, crc)

    def _checked(self, at: int, header: _Header) -> Frame | None:
        begin = at + HEADER_LEN
        payload = self._view[begin : begin + header.length]
        if zlib.crc32(payload, zlib.crc32(self._view[at : begin - 4])) != header.crc:
            return None
        return Frame(header.kind, header.flags, header.session, header.seq, header.ack, payload)
