"""One exec stream: a WebSocket on one side, a session with the guest on the other.

Two pumps run beside each other. Input is read from the socket as long as the client keeps to its
credit, so a signal or a client that died is seen at once however long stdin is stuck; what waits
for the guest is bounded by the window. Output waits for the client. Whatever ends first ends both,
and a stream that ends before the command did leaves the session abandoned, never silently short.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from diapause import limits
from diapause.daemon.engine_api import Session
from diapause.daemon.exec_wire import (
    STDIN,
    STDIN_WINDOW_BYTES,
    Control,
    Report,
    decode_control,
    decode_request,
)
from diapause.daemon.state import State
from diapause.errors import DiapauseError, ExecCut, InvalidRequest
from diapause.guest import session as guest

log = logging.getLogger("diapause.daemon")

FIRST_MESSAGE_S = 20.0
STREAMS_MAX = 512
# What a message that waits counts for beside its data, so that tiny and empty ones are bounded too.
MESSAGE_COST_BYTES = 64
# A report gives credit back in pieces of this size: often enough to keep a client busy.
CREDIT_STEP_BYTES = STDIN_WINDOW_BYTES // 4
_CLOSE_NORMAL, _CLOSE_ERROR = 1000, 1011


Begin = Callable[[State, WebSocket], Awaitable[Session]]


async def exec_stream(state: State, socket: WebSocket) -> None:
    """Serve one command from its handshake to its last report."""
    await _serve(state, socket, _begin_exec)


async def console_stream(state: State, socket: WebSocket) -> None:
    """Serve one visit at a console; it has no request and ends by a report with an error."""
    await _serve(state, socket, _begin_console)


async def _serve(state: State, socket: WebSocket, begin: Begin) -> None:
    await socket.accept()
    state.streams += 1
    try:
        report = await _run(state, socket, begin)
    except WebSocketDisconnect:
        return
    except DiapauseError as error:
        report = Report(error=error.to_dict())
    except Exception as error:
        log.exception("an exec stream failed")
        report = Report(error=DiapauseError(cause=f"{type(error).__name__}: {error}").to_dict())
    finally:
        state.streams -= 1
    await _finish(socket, report)


async def _run(state: State, socket: WebSocket, begin: Begin) -> Report:
    if state.streams > STREAMS_MAX:
        cause = f"{STREAMS_MAX} exec streams are open already"
        raise InvalidRequest(what="another exec", cause=cause)
    session = await begin(state, socket)
    try:
        return await _pump(socket, session)
    except BaseException:
        session.abandon()
        raise


async def _begin_console(state: State, socket: WebSocket) -> Session:
    engine = await state.engine()
    return await engine.console(str(socket.path_params["ref"]))


async def _begin_exec(state: State, socket: WebSocket) -> Session:
    try:
        message = await asyncio.wait_for(_receive(socket), FIRST_MESSAGE_S)
    except TimeoutError as error:
        cause = f"no request came within {FIRST_MESSAGE_S:.0f} s"
        raise InvalidRequest(what="the exec stream", cause=cause) from error
    if not isinstance(message, str):
        raise InvalidRequest(what="the exec stream", cause="its first message is not a request")
    request = decode_request(message)
    engine = await state.engine()
    wanted = msgspec.convert(request, guest.ExecRequest, from_attributes=True)
    return await engine.exec(str(socket.path_params["ref"]), wanted)


async def _pump(socket: WebSocket, session: Session) -> Report:
    """Move bytes until the command ended, the client left, or the guest was cut off."""
    queue = _Input()
    output = asyncio.create_task(_send_output(socket, session))
    client = asyncio.create_task(_read_client(socket, session, queue))
    stdin = asyncio.create_task(_feed_stdin(socket, session, queue))
    try:
        waiting: set[asyncio.Task[Any]] = {output, client, stdin}
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if output in done:
                return output.result()
            # Either ends early only by failing, but for stdin, which ends with the input.
            for task in done:
                task.result()
    finally:
        for task in (output, client, stdin):
            task.cancel()
        await asyncio.gather(output, client, stdin, return_exceptions=True)


async def _send_output(socket: WebSocket, session: Session) -> Report:
    async for event in session:
        code = getattr(event, "code", None)
        if code is not None:
            return Report(exit=int(code))
        data, head = event.data, bytes([event.stream])
        if len(data) <= limits.EXEC_MESSAGE_BYTES_MAX:
            await socket.send_bytes(head + data)
            continue
        for start in range(0, len(data), limits.EXEC_MESSAGE_BYTES_MAX):
            await socket.send_bytes(head + data[start : start + limits.EXEC_MESSAGE_BYTES_MAX])
    raise ExecCut(cause="the guest's stream ended without an exit code")


class _Input:
    """Stdin that the client sent and the guest has not taken: bounded, in order."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Condition()

    async def put(self, data: bytes) -> None:
        """Add a message; waits only for a client that sends beyond its credit."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._size <= STDIN_WINDOW_BYTES)
            self._parts.append(data)
            self._size += len(data) + MESSAGE_COST_BYTES
            self._changed.notify_all()

    async def get(self) -> bytes:
        """The next message; waits until there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._parts))
            data = self._parts.popleft()
            self._size -= len(data) + MESSAGE_COST_BYTES
            self._changed.notify_all()
            return data


async def _read_client(socket: WebSocket, session: Session, queue: _Input) -> None:
    ended = False
    while True:
        message = await _receive(socket)
        if isinstance(message, str):
            await _obey(decode_control(message), session)
            continue
        if message[:1] != bytes([STDIN]) or len(message) > limits.EXEC_MESSAGE_BYTES_MAX + 1:
            cause = f"a client sends stream {STDIN}, at most {limits.EXEC_MESSAGE_BYTES_MAX} bytes"
            raise InvalidRequest(what="a message of the exec stream", cause=cause)
        if ended:
            raise InvalidRequest(what="the exec stream", cause="it sent input after its end")
        ended = len(message) == 1
        await queue.put(message[1:])


async def _obey(control: Control, session: Session) -> None:
    with _output_tells():
        if control.signal is not None:
            await session.signal(control.signal)
        if control.resize is not None:
            await session.resize(*control.resize)


async def _feed_stdin(socket: WebSocket, session: Session, queue: _Input) -> None:
    credit = 0
    with _output_tells():
        while data := await queue.get():
            await session.write(data)
            credit += len(data)
            if credit >= CREDIT_STEP_BYTES:
                await _report(socket, Report(credit=credit))
                credit = 0
        await session.end_input()


@contextlib.contextmanager
def _output_tells() -> Iterator[None]:
    """A session that was cut says so when its output is read, after all that had come before."""
    with contextlib.suppress(ExecCut):
        yield


async def _receive(socket: WebSocket) -> str | bytes:
    """The next message; raises WebSocketDisconnect when the client has left."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006), message.get("reason"))
    text: str | None = message.get("text")
    return text if text is not None else bytes(message["bytes"])


async def _report(socket: WebSocket, report: Report) -> None:
    await socket.send_text(msgspec.json.encode(report).decode())


async def _finish(socket: WebSocket, report: Report) -> None:
    """Say the last word and close; a client that is gone hears neither."""
    if socket.client_state is WebSocketState.DISCONNECTED:
        return
    try:
        await _report(socket, report)
        await socket.close(_CLOSE_NORMAL if report.error is None else _CLOSE_ERROR)
    except (WebSocketDisconnect, RuntimeError) as error:
        log.info("an exec client left before the end: %s", error)
