"""Kinds, limits and payloads of the agent's protocol (``docs/formats/agent-protocol.md``).

The guest is hostile: every payload is decoded into a type, and text from it is shortened and made
printable before it reaches anything. Unknown fields are ignored: an agent that slept in an old
snapshot and a newer host understand each other. Nothing here does I/O.
"""

from __future__ import annotations

import struct
from typing import Annotated, TypeVar

import msgspec

from diapause.units import KIB, MIB

PROTOCOL = 1
MAGIC = b"DPA\x01"
HEADER_LEN = 36
FRAME_MAX = 32 * KIB  # header included: what a virtio-serial port takes in one write
PAYLOAD_MAX = FRAME_MAX - HEADER_LEN
EXEC_MAX = 1 * MIB
STREAM_WINDOW = 256 * KIB  # bytes of one stream that may be on their way ungranted
GRANT_STEP = STREAM_WINDOW // 4
ACK_STEP = 128 * KIB
PREAMBLE = bytes(FRAME_MAX)
MORE = 1

HELLO, WELCOME, ANNOUNCE, ACK, PING, PONG, ERROR = range(1, 8)
EXEC, STDIN, STDIN_EOF, SIGNAL, RESIZE, CREDIT, CLOSE, FREEZE, THAW = range(16, 25)
STARTED, STDOUT, STDERR, EXIT, EXEC_FAILED, STDIN_CLOSED, CLOSED, FROZEN, THAWED = range(32, 41)
LAST_UNNUMBERED = ERROR

_CREDIT = struct.Struct("<BxxxI")
_TEXT_MAX = 1024
_LIST_MAX = 64


# A JSON number may have thousands of digits; arithmetic and databases take 64 bits.
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Signed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class ProtocolError(Exception):
    """The guest's agent did what the protocol forbids."""


class Identity(msgspec.Struct, kw_only=True):
    """What makes a clone itself."""

    hostname: str
    machine_id: str


class Hello(msgspec.Struct, kw_only=True):
    """Payload of HELLO."""

    nonce: str
    link_id: str
    received: int
    realtime_ns: int
    entropy: str
    identity: Identity | None = None
    protocol: int = PROTOCOL
    operation: str | None = None  # for the guest's kernel log; an agent of before ignores it


class Welcome(msgspec.Struct, kw_only=True):
    """Payload of WELCOME; `clock_error_ms` is added by the host, which knows the round trip."""

    protocol: _Number
    nonce: str
    version: str
    boot_id: str
    incarnation: str
    epoch: _Number
    resumed: bool
    received: _Number
    realtime_ns: _Signed
    monotonic_ns: _Signed
    pid: _Number
    failed: list[str]
    clock_error_ms: float = 0.0


class Exec(msgspec.Struct, kw_only=True):
    """Payload of EXEC, over all its frames."""

    argv: list[str]
    cwd: str | None = None
    env: dict[str, str] = {}
    tty: bool = False
    rows: int = 24
    cols: int = 80
    stdin: bool = True


class Started(msgspec.Struct, kw_only=True):
    """Payload of STARTED."""

    pid: int


class Exited(msgspec.Struct, kw_only=True):
    """Payload of EXIT."""

    code: int
    signal: int | None


class ExecFailed(msgspec.Struct, kw_only=True):
    """Payload of EXEC_FAILED."""

    what: str
    errno: int
    message: str


class Signal(msgspec.Struct, kw_only=True):
    """Payload of SIGNAL."""

    number: int


class Resize(msgspec.Struct, kw_only=True):
    """Payload of RESIZE."""

    rows: int
    cols: int


class Request(msgspec.Struct, kw_only=True):
    """Payload of FREEZE and THAW."""

    id: int
    operation: str | None = None


class Filesystems(msgspec.Struct, kw_only=True):
    """Payload of FROZEN and THAWED."""

    id: int
    mounts: list[str]
    failed: list[str]


class Failure(msgspec.Struct, kw_only=True):
    """Payload of ERROR."""

    cause: str


T = TypeVar("T")


def decode_json(payload: bytes | memoryview, kind: type[T]) -> T:
    """The payload as its type; raises ProtocolError if it isn't one."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a {kind.__name__} that can't be read") from error


def clean_text(text: str) -> str:
    """Text from the guest, short and printable: it reaches messages and terminals."""
    return "".join(c if c.isprintable() else "?" for c in text[:_TEXT_MAX])


def clean_list(texts: list[str]) -> list[str]:
    """A list of texts from the guest, bounded."""
    return [clean_text(text) for text in texts[:_LIST_MAX]]


def encode_credit(stream: int, count: int) -> bytes:
    """Payload of CREDIT: stream 0 is input, 1 output, 2 errors."""
    return _CREDIT.pack(stream, count)


def decode_credit(payload: bytes | memoryview) -> tuple[int, int]:
    """Reads the payload of CREDIT."""
    if len(payload) != _CREDIT.size:
        raise ProtocolError("a CREDIT of the wrong size")
    stream, count = _CREDIT.unpack(payload)
    return stream, count
