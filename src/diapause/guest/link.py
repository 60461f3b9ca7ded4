"""The host's end of the channel to one guest's agent.

A link outlives its connections: sessions wait while it is detached and go on after the next
`attach`, without a lost or doubled byte, because frames are numbered and kept until acknowledged.
When the agent turns out not to know the link any more (it was restarted), every session ends as
cut, with the cause. A guest that breaks the protocol ends the link, never an exception out of the
event loop. A link belongs to one life of a guest: one that goes back in time needs a new link.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from diapause import errors, limits
from diapause.guest import frames, protocol
from diapause.guest.frames import Decoder, Frame, LostPlaceError
from diapause.guest.greeting import Greeting
from diapause.guest.outbox import Outbox
from diapause.guest.protocol import Filesystems, Identity, ProtocolError, Welcome
from diapause.guest.session import ExecRequest, Session
from diapause.guest.wire import Message, Wire
from diapause.operation import current

__all__ = ["Identity", "Link", "Welcome"]

T = TypeVar("T")

SESSIONS_MAX = 256
_ACK_DELAY_S = 0.02
_LOST_MAX = 8  # times that the place in the stream may be lost on one connection
_REGREET_S = limits.AGENT_READY_S


class Link:
    """One sandbox's agent, for one life of the daemon."""

    def __init__(self, sandbox: str) -> None:
        self.sandbox = sandbox
        self.cause = ""  # why the link is closed; empty until then
        self._link_id = secrets.token_hex(16)
        self._instance: tuple[str, int] | None = None  # which agent, and which of its links
        self._outbox = Outbox()
        self._received = 0
        self._unacknowledged = 0
        self._decoder = Decoder()
        self._wire: Wire | None = None
        self._urgent: deque[Callable[[], bytes]] = deque()
        self._greeting: Greeting | None = None
        self._welcomed: asyncio.Future[Welcome] | None = None
        self._attached = asyncio.Event()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._lost = 0
        self._bound_s = 0.0
        self._identity: Identity | None = None
        self._operation: str | None = None  # what the connection is made for
        self._sessions: dict[int, Session] = {}
        self._closing: set[int] = set()  # abandoned, and not confirmed by the agent
        self._next_number = 1
        self._requests: dict[int, asyncio.Future[Filesystems]] = {}
        self._pongs: dict[bytes, asyncio.Future[None]] = {}

    # Connections.

    @property
    def attached(self) -> bool:
        """Whether the agent answers on a connection now."""
        return self._wire is not None and self._greeting is None

    async def attach(
        self, sock: socket.socket, *, identity: Identity | None, bound_s: float
    ) -> Welcome:
        """Takes over a connected socket and greets the agent; raises AgentUnreachable.

        The socket belongs to the link from here on, also when this fails.
        """
        await self.detach()
        if self.cause:
            sock.close()
            raise errors.ExecCut(cause=self.cause)
        self._identity, self._operation = identity, _asked()
        self._bound_s = bound_s
        self._lost = 0
        self._decoder.clear()
        self._wire = Wire(
            sock,
            space=self._decoder.space,
            arrived=self._arrived,
            next_message=self._next_message,
            gone=self._gone,
        )
        self._welcomed = asyncio.get_running_loop().create_future()
        welcomed = self._welcomed
        self._greet(bound_s)
        try:
            return await asyncio.wait_for(welcomed, bound_s)
        except TimeoutError:
            raise errors.AgentUnreachable(sandbox=self.sandbox, bound_s=bound_s) from None
        finally:
            if not self.attached and self._welcomed is welcomed:
                self._disconnect()

    async def detach(self) -> None:
        """Lets go of the connection; sessions wait for the next."""
        self._disconnect()

    def close(self, cause: str) -> None:
        """Ends the link: every session ends as cut."""
        if self.cause:
            return
        self.cause = cause
        self._disconnect()
        self._cut_sessions(cause)
        self._attached.set()  # whoever waits for it looks at the cause

    # What a client asks for.

    async def exec(self, request: ExecRequest) -> Session:
        """Starts a command; its session yields output and then its exit."""
        if not request.argv:
            raise errors.InvalidRequest(what="the command", cause="it is empty")
        try:
            text = msgspec.json.encode(request)
        except (msgspec.MsgspecError, UnicodeEncodeError) as error:
            raise errors.InvalidRequest(what="the command", cause=str(error)) from error
        if len(text) > protocol.EXEC_MAX:
            raise errors.InvalidRequest(what="the command", cause="it is too long")
        await self._wait_attached(limits.AGENT_READY_S)
        if len(self._sessions) + len(self._closing) >= SESSIONS_MAX:
            cause = f"{SESSIONS_MAX} commands are running"
            raise errors.AgentRefused(sandbox=self.sandbox, what="an exec", cause=cause)
        session = Session(self, self._next_number, request)
        self._next_number += 1
        self._sessions[session.number] = session
        for at in range(0, len(text), protocol.PAYLOAD_MAX):
            part = text[at : at + protocol.PAYLOAD_MAX]
            flags = protocol.MORE if at + len(part) < len(text) else 0
            self.push(protocol.EXEC, session.number, part, flags)
        return session

    async def freeze_filesystems(self, bound_s: float) -> list[str]:
        """Syncs and freezes the guest's file systems; returns their mount points."""
        answer = await self._ask(protocol.FREEZE, bound_s)
        if answer.failed:
            cause = "; ".join(protocol.clean_list(answer.failed))
            raise errors.AgentRefused(sandbox=self.sandbox, what="to freeze", cause=cause)
        return protocol.clean_list(answer.mounts)

    async def thaw_filesystems(self, bound_s: float) -> None:
        """Thaws them."""
        answer = await self._ask(protocol.THAW, bound_s)
        if answer.failed:
            cause = "; ".join(protocol.clean_list(answer.failed))
            raise errors.AgentRefused(sandbox=self.sandbox, what="to thaw", cause=cause)

    async def ping(self, bound_s: float) -> float:
        """Asks the agent for a sign of life; returns the round trip in seconds."""
        await self._wait_attached(bound_s)
        token = secrets.token_bytes(8)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs[token] = future
        begun = time.monotonic()
        try:
            self._send_urgent(lambda: frames.unnumbered(protocol.PING, token, self._received))
            await self._bounded(future, bound_s)
        finally:
            self._pongs.pop(token, None)
        return time.monotonic() - begun

    # What a session needs.

    def push(self, kind: int, session: int, payload: bytes = b"", flags: int = 0) -> None:
        """Queues a numbered frame."""
        if self.cause:
            return
        if self._outbox.is_full:
            self._break("it acknowledges nothing")
            return
        self._outbox.push(kind, session, payload, flags)
        self._send()

    @property
    def has_room(self) -> bool:
        """Whether data may be queued."""
        return self._outbox.has_room

    async def wait_for_room(self) -> None:
        """Returns when data may be queued or the session should look again."""
        await self._outbox.wait_for_room()

    def wake_writers(self) -> None:
        """Makes writers that wait for room look again at their session."""
        self._outbox.wake()

    def forget(self, session: int) -> None:
        """The session is over, or abandoned and not yet confirmed."""
        gone = self._sessions.pop(session, None)
        if gone is not None and gone.abandoned:
            self._closing.add(session)

    # The connection.

    def _greet(self, bound_s: float) -> None:
        self._attached.clear()
        self._urgent.clear()
        self._acknowledged()
        self._greeting = Greeting(self._link_id, self._received, self._identity, self._operation)
        self._timer("greet-bound", bound_s, self._unanswered)
        self._say_hello()

    def _say_hello(self) -> None:
        if self._greeting is None or self._wire is None:
            return
        # A HELLO that has not left yet would only be followed by another one.
        if not self._urgent:
            self._urgent.extend(self._greeting.hello())
        self._timer("hello", self._greeting.later(), self._say_hello)
        self._wire.send()

    def _unanswered(self) -> None:
        if self._welcomed is None or self._welcomed.done():
            self.close("the guest's agent stopped answering")

    def _disconnect(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._attached.clear()
        self._greeting = None
        self._urgent.clear()
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        if self._welcomed is not None and not self._welcomed.done():
            unreachable = errors.AgentUnreachable(sandbox=self.sandbox, bound_s=self._bound_s)
            self._welcomed.set_exception(unreachable)
        self._welcomed = None

    def _gone(self, _cause: str) -> None:
        # The VMM went away or was replaced: what happens to the sessions is for the daemon to say.
        self._disconnect()

    def _break(self, cause: str) -> None:
        welcomed = self._welcomed
        self._welcomed = None
        self.close(f"the guest's agent broke the protocol: {cause}")
        if welcomed is not None and not welcomed.done():
            refused = errors.AgentRefused(sandbox=self.sandbox, what="the host", cause=cause)
            welcomed.set_exception(refused)

    def _timer(self, name: str, delay_s: float, callback: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(delay_s, callback)

    def _send(self) -> None:
        if self._wire is not None:
            self._wire.send()

    def _send_urgent(self, message: Callable[[], bytes]) -> None:
        if self._greeting is None:
            self._urgent.append(message)
            self._send()

    def _next_message(self) -> Message | None:
        if self._urgent:
            return [self._urgent.popleft()()]
        if self._greeting is not None:
            return None
        frame = self._outbox.take()
        if frame is None:
            return None
        frame = frame._replace(ack=self._received)
        self._acknowledged()
        return [frames.encode_header(frame), frame.payload]

    # What arrives.

    def _arrived(self, count: int) -> None:
        self._decoder.fill(count)
        try:
            if self._greeting is not None and not self._welcome():
                return
            for frame in self._decoder.frames():
                self._take(frame)
                if self._wire is None or self._greeting is not None:
                    return
            self._owe_acknowledgement()
        except LostPlaceError as lost:
            self._find_place(str(lost))
        except ProtocolError as violation:
            self._break(str(violation))

    def _welcome(self) -> bool:
        assert self._greeting is not None
        welcome = self._decoder.find_welcome(self._greeting.nonce)
        if welcome is None:
            return False
        good = self._greeting.judge(welcome)
        self._adopt(welcome)
        if not good:
            self._greeting.renew(self._received)
            if self._greeting.hurries:
                self._say_hello()
            return False
        self._greeting = None
        for name in ("greet-bound", "hello"):
            timer = self._timers.pop(name, None)
            if timer is not None:
                timer.cancel()
        self._attached.set()
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(welcome)
        self._send()
        return True

    def _adopt(self, welcome: Welcome) -> None:
        instance = (welcome.incarnation, welcome.epoch)
        known, self._instance = self._instance, instance
        if known is None or known == instance:
            self._outbox.rewind(welcome.received)
            return
        restarted = known[0] != instance[0]
        self._outbox.reset()
        self._received = 0
        what = "was restarted" if restarted else "does not know this connection any more"
        self._cut_sessions(f"the guest's agent {what}")

    def _find_place(self, cause: str) -> None:
        self._lost += 1
        if self._lost > _LOST_MAX:
            self._break(cause)
            return
        self._greet(_REGREET_S)

    def _take(self, frame: Frame) -> None:
        self._outbox.acknowledge(frame.ack)
        if frame.seq == 0:
            self._take_unnumbered(frame)
            return
        if frame.seq <= self._received:
            return
        if frame.seq > self._received + 1:
            raise LostPlaceError("a frame is missing")
        self._received = frame.seq
        self._unacknowledged += len(frame.payload) + protocol.HEADER_LEN
        if self._unacknowledged >= protocol.ACK_STEP:
            self._acknowledge()
        if frame.session == 0:
            self._take_answer(frame)
            return
        session = self._sessions.get(frame.session)
        if session is not None:
            session.take(frame.kind, frame.payload)
        elif frame.kind == protocol.CLOSED:
            self._closing.discard(frame.session)
        elif not 0 < frame.session < self._next_number:
            raise ProtocolError("a frame of a session that never was")

    def _take_unnumbered(self, frame: Frame) -> None:
        if frame.kind == protocol.ANNOUNCE:
            raise LostPlaceError("the agent asks for a new connection")
        if frame.kind == protocol.ERROR:
            cause = protocol.decode_json(frame.payload, protocol.Failure).cause
            raise ProtocolError(f"it says that the host did: {protocol.clean_text(cause)}")
        if frame.kind == protocol.PONG:
            future = self._pongs.pop(bytes(frame.payload[:8]), None)
            if future is not None and not future.done():
                future.set_result(None)

    def _take_answer(self, frame: Frame) -> None:
        if frame.kind in (protocol.FROZEN, protocol.THAWED):
            answer = protocol.decode_json(frame.payload, Filesystems)
            future = self._requests.pop(answer.id, None)
            if future is not None and not future.done():
                future.set_result(answer)

    def _owe_acknowledgement(self) -> None:
        if self._unacknowledged and "ack" not in self._timers:
            self._timer("ack", _ACK_DELAY_S, self._acknowledge)

    def _acknowledge(self) -> None:
        self._timers.pop("ack", None)
        if self._unacknowledged:
            self._acknowledged()
            # One is enough for a peer that does not read: it says what holds when it leaves.
            if self._acknowledgement not in self._urgent:
                self._send_urgent(self._acknowledgement)

    def _acknowledgement(self) -> bytes:
        return frames.unnumbered(protocol.ACK, ack=self._received)

    def _acknowledged(self) -> None:
        self._unacknowledged = 0
        timer = self._timers.pop("ack", None)
        if timer is not None:
            timer.cancel()

    # Waiting.

    def _cut_sessions(self, cause: str) -> None:
        self._closing.clear()
        for session in list(self._sessions.values()):
            session.cut(cause)
        waiting: list[asyncio.Future[Any]] = [*self._requests.values(), *self._pongs.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(errors.ExecCut(cause=cause))
        self._requests.clear()
        self._pongs.clear()
        self._outbox.wake()

    async def _wait_attached(self, bound_s: float) -> None:
        try:
            async with asyncio.timeout(bound_s):
                await self._attached.wait()
        except TimeoutError:
            raise errors.AgentUnreachable(sandbox=self.sandbox, bound_s=bound_s) from None
        if self.cause:
            raise errors.ExecCut(cause=self.cause)

    async def _ask(self, kind: int, bound_s: float) -> Filesystems:
        await self._wait_attached(bound_s)
        number = secrets.randbits(53)
        future: asyncio.Future[Filesystems] = asyncio.get_running_loop().create_future()
        self._requests[number] = future
        try:
            self.push(kind, 0, msgspec.json.encode(protocol.Request(id=number, operation=_asked())))
            return await self._bounded(future, bound_s)
        finally:
            self._requests.pop(number, None)

    async def _bounded(self, future: asyncio.Future[T], bound_s: float) -> T:
        try:
            return await asyncio.wait_for(future, bound_s)
        except TimeoutError:
            raise errors.AgentUnreachable(sandbox=self.sandbox, bound_s=bound_s) from None


def _asked() -> str | None:
    """The id of what this is done for, where a client asked for it."""
    operation = current()
    return None if operation is None else operation.id
