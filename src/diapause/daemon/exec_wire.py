"""What an exec stream says on its WebSocket, for both ends.

The client's first message is an `ExecRequest` as JSON text. After it, a binary message is one byte
for the stream and at most `limits.EXEC_MESSAGE_BYTES_MAX` of data; a text message is JSON: a
`Control` from the client, a `Report` from the daemon. An empty stdin message ends the input. The
daemon's last message is a report with `exit` or `error`; a stream without one was cut.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from diapause import limits
from diapause.errors import InvalidRequest
from diapause.model import Answer, Strict
from diapause.units import KIB

STDIN, STDOUT, STDERR = 0, 1, 2

# How much stdin a client may have sent beyond what the daemon gave back as credit. One that keeps
# to it can always get a signal through; one that doesn't is held back by the socket alone.
STDIN_WINDOW_BYTES = 1024 * KIB

Environment = Annotated[dict[str, str], Meta(max_length=limits.EXEC_ARGUMENTS_MAX)]
Side = Annotated[int, Meta(ge=1, le=10_000)]


class ExecRequest(Strict):
    """Run a command in a guest."""

    argv: Annotated[list[str], Meta(min_length=1, max_length=limits.EXEC_ARGUMENTS_MAX)]
    cwd: str | None = None
    env: Environment = msgspec.field(default_factory=dict)
    tty: bool = False
    rows: Side = 24
    cols: Side = 80
    stdin: bool = False


class Control(Strict):
    """From the client: a signal for the command, or the terminal's new size (rows, columns)."""

    signal: Annotated[int, Meta(ge=1, le=64)] | None = None
    resize: tuple[Side, Side] | None = None


class Report(Answer, omit_defaults=True):
    """From the daemon: room for more stdin, the command's exit code, or why there is none."""

    credit: int | None = None
    exit: int | None = None
    error: dict[str, Any] | None = None


def decode_request(text: str | bytes) -> ExecRequest:
    """The first message, checked against the limits; raises InvalidRequest."""
    try:
        request = msgspec.json.decode(text, type=ExecRequest)
    except msgspec.DecodeError as error:
        raise InvalidRequest(what="the exec request", cause=error) from error
    words = [*request.argv, *request.env, *request.env.values(), request.cwd or ""]
    if any("\0" in word for word in words):
        raise InvalidRequest(what="the exec request", cause="it contains a NUL character")
    if sum(len(word.encode()) + 1 for word in words) > limits.EXEC_ARGUMENTS_BYTES_MAX:
        cause = f"arguments and environment exceed {limits.EXEC_ARGUMENTS_BYTES_MAX} bytes"
        raise InvalidRequest(what="the exec request", cause=cause)
    return request


def decode_control(text: str | bytes) -> Control:
    """A later text message of the client; raises InvalidRequest."""
    try:
        return msgspec.json.decode(text, type=Control)
    except msgspec.DecodeError as error:
        raise InvalidRequest(what="a message of the exec stream", cause=error) from error
