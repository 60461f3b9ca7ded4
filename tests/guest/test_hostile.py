"""Either side against one that does not keep to the protocol: bounded, typed, never stuck."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import zlib
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diapause import errors
from diapause.guest import protocol
from diapause.guest.frames import Decoder, Frame, encode, unnumbered
from diapause.guest.link import Link
from diapause.guest.protocol import FRAME_MAX, PAYLOAD_MAX, STREAM_WINDOW
from diapause.guest.session import ExecRequest, Exit, Output, Session
from diapause.units import MIB
from tests.framework.agent import Agent, attached, finish, run

BOUND_S = 60.0


def play(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, BOUND_S))


class FalseAgent:
    """Answers a link's HELLO properly and then sends whatever a test likes."""

    def __init__(self) -> None:
        self.near, self._far = socket.socketpair()
        self._far.setblocking(False)
        self.hellos = 0
        self.incarnation = "one"
        self.clock_errors_ns: list[int] = []
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        seen = b""
        mark = protocol.MAGIC + bytes([protocol.HELLO])
        while data := await loop.sock_recv(self._far, 1 << 20):
            seen = (seen + data).lstrip(b"\0")
            at = seen.find(mark)
            if at < 0 or not seen.endswith(b"}"):
                continue
            hello = json.loads(seen[at + protocol.HEADER_LEN :])
            seen = b""
            self.hellos += 1
            await self.send(unnumbered(protocol.WELCOME, self._welcome(hello)))

    def _welcome(self, hello: dict[str, Any]) -> bytes:
        error_ns = self.clock_errors_ns.pop(0) if self.clock_errors_ns else 0
        answer = {
            "protocol": 1, "nonce": hello["nonce"], "version": "0\x1b[2J", "boot_id": "b",
            "incarnation": self.incarnation, "epoch": 1, "resumed": True, "received": 0,
            "realtime_ns": hello["realtime_ns"] + error_ns, "monotonic_ns": 0, "pid": 1,
            "failed": ["x"] * 500,
        }  # fmt: skip
        return json.dumps(answer).encode()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._far, data)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._far.close()


async def begin() -> tuple[FalseAgent, Link, Session]:
    agent, link = FalseAgent(), Link("test")
    welcome = await link.attach(agent.near, identity=None, bound_s=10)
    assert len(welcome.failed) == 64
    assert "\x1b" not in welcome.version
    return agent, link, await link.exec(ExecRequest(argv=["x"]))


def numbered(seq: int, kind: int, payload: bytes = b"", session: int = 1, ack: int = 0) -> bytes:
    return encode(Frame(kind, 0, session, seq, ack, payload))


VIOLATIONS = {
    "a session that never was": [numbered(1, protocol.STDOUT, b"x", session=99)],
    "an acknowledgement too many": [numbered(1, protocol.STDOUT, b"x", ack=77)],
    "an exit code that is none": [numbered(1, protocol.EXIT, b'{"code":900,"signal":null}')],
    "an exit that is not JSON": [numbered(1, protocol.EXIT, b"\xff{")],
    "an error number that is none": [
        numbered(1, protocol.EXEC_FAILED, b'{"what":"command","errno":%d,"message":""}' % 10**30)
    ],
    "credit that is not due": [
        numbered(1, protocol.CREDIT, protocol.encode_credit(0, STREAM_WINDOW))
    ],
    "credit for output": [numbered(1, protocol.CREDIT, protocol.encode_credit(1, 1))],
    "more output than granted": [
        numbered(n, protocol.STDOUT, bytes(PAYLOAD_MAX)) for n in range(1, 10)
    ],
    "an error of its own": [unnumbered(protocol.ERROR, b'{"cause":"\\u001b[2J"}')],
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_ends_the_link_with_a_typed_error(name: str) -> None:
    async def scene() -> None:
        agent, link, session = await begin()
        for frame in VIOLATIONS[name]:
            await agent.send(frame)
        while not link.cause:  # reading would grant more output
            await asyncio.sleep(0.001)
        with pytest.raises(errors.ExecCut, match="broke the protocol") as caught:
            await finish(session)
        assert "\x1b" not in caught.value.message
        assert not link.attached
        with pytest.raises(errors.ExecCut):
            await link.exec(ExecRequest(argv=["x"]))
        await agent.stop()

    play(scene())


def test_a_stream_that_makes_no_sense_is_greeted_again_but_not_for_ever() -> None:
    async def scene() -> None:
        agent, link, session = await begin()
        while not link.cause:
            before = agent.hellos
            await agent.send(b"?" + os.urandom(100))
            while not link.cause and (agent.hellos == before or not link.attached):
                await asyncio.sleep(0.001)
        assert 3 <= agent.hellos <= 20
        with pytest.raises(errors.ExecCut, match="broke the protocol"):
            await finish(session)
        await agent.stop()

    play(scene())


def test_an_agent_that_announces_a_new_self_cuts_the_sessions() -> None:
    async def scene() -> None:
        agent, link, session = await begin()
        agent.incarnation = "two"
        half = numbered(1, protocol.STDOUT, b"y" * 1000)[:500]
        announce = unnumbered(protocol.ANNOUNCE, b'{"incarnation":"two"}')
        await agent.send(half + bytes(FRAME_MAX) + announce)
        with pytest.raises(errors.ExecCut, match="was restarted"):
            await finish(session)
        await link.exec(ExecRequest(argv=["x"]))
        link.close("done")
        await agent.stop()

    play(scene())


def test_a_clock_that_is_off_is_set_again() -> None:
    async def scene() -> None:
        agent, link = FalseAgent(), Link("test")
        agent.clock_errors_ns = [-(10**9), 10**18, 2 * 10**8]
        welcome = await link.attach(agent.near, identity=None, bound_s=10)
        assert agent.hellos == 4
        assert welcome.clock_error_ms <= 100
        link.close("done")
        await agent.stop()

    play(scene())


def test_a_clock_that_can_not_be_set_is_an_error_and_no_flood() -> None:
    async def scene() -> None:
        agent, link = FalseAgent(), Link("test")
        agent.clock_errors_ns = [10**10] * 1000
        with pytest.raises(errors.AgentUnreachable):
            await link.attach(agent.near, identity=None, bound_s=0.5)
        assert agent.hellos < 10
        await agent.stop()

    play(scene())


def test_tiny_pieces_of_output_do_not_pile_up() -> None:
    async def scene() -> None:
        agent, link, session = await begin()
        seq = 0
        for _ in range(5000):
            for kind in (protocol.STDOUT, protocol.STDERR):
                seq += 1
                await agent.send(numbered(seq, kind, b"z"))
        await agent.send(numbered(seq + 1, protocol.EXIT, b'{"code":0,"signal":null}'))
        while session._end is None:
            await asyncio.sleep(0.001)
        assert len(session._pieces) < 1100
        items = [item async for item in session]
        assert items[-1] == Exit(0)
        streams = {1: b"", 2: b""}
        for item in items:
            if isinstance(item, Output):
                streams[item.stream] += item.data
        assert streams == {1: b"z" * 5000, 2: b"z" * 5000}
        link.close("done")
        await agent.stop()

    play(scene())


KINDS = st.sampled_from([*range(0, 9), *range(16, 26), *range(31, 43), 255])
SMALL = st.integers(0, 3) | st.integers(0, 2**64 - 1)
HOSTILE = st.builds(
    lambda kind, flags, session, seq, ack, payload: encode(
        Frame(kind, flags, session, seq, ack, payload)
    ),
    KINDS, st.integers(0, 255), st.integers(0, 2) | st.integers(0, 2**32 - 1), SMALL, SMALL,
    st.binary(max_size=60) | st.sampled_from([b"{}", b'{"id":1}', b'{"pid":1}', b"[]"]),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(HOSTILE | st.binary(max_size=80), max_size=12))
def test_no_frame_from_a_guest_raises_out_of_the_loop(stream: list[bytes]) -> None:
    async def scene() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(context)
        )
        agent, link, session = await begin()
        await agent.send(b"".join(stream))
        await asyncio.sleep(0.002)
        link.close("the test is over")
        try:
            async with asyncio.timeout(5):
                await finish(session)
        except errors.DiapauseError:
            pass
        await agent.stop()
        assert failures == []

    play(scene())


async def rude_host(agent: Agent, data: bytes) -> None:
    """Connects without a greeting, sends bytes, reads a little, goes away."""
    sock = await agent.connect()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(0.2):
            await loop.sock_sendall(sock, data)
            await loop.sock_recv(sock, 4096)
    except (OSError, TimeoutError):
        pass
    sock.close()


def hello(link_id: str = "z", **changes: object) -> bytes:
    fields = {
        "protocol": 1, "nonce": "n", "link_id": link_id, "received": 0, "realtime_ns": 0,
        "entropy": "00", **changes,
    }  # fmt: skip
    return protocol.PREAMBLE + unnumbered(protocol.HELLO, json.dumps(fields).encode())


def oversize(length: int) -> bytes:
    head = encode(Frame(protocol.STDIN, 0, 1, 1, 0, b""))[:-4]
    head = head[:8] + length.to_bytes(4, "little") + head[12:]
    return head + zlib.crc32(head).to_bytes(4, "little") + bytes(5000)


def test_the_agent_survives_whatever_a_host_sends(agent: Agent) -> None:
    async def scene() -> None:
        dice = random.Random(7)
        rude = [
            dice.randbytes(100_000),
            bytes(200_000),
            protocol.MAGIC * 10_000,
            oversize(0xFFFF_FFFF),
            oversize(PAYLOAD_MAX + 1),
            hello()[:-3],
            hello(received=2**64 - 1),
            hello(received="x"),
            hello() + numbered(5, protocol.STDIN, b"a gap"),
            hello() + numbered(1, 200, b"an unknown kind") + numbered(2, protocol.CLOSE),
            hello() + numbered(1, protocol.EXEC, b"not json"),
            hello() + numbered(1, protocol.EXEC, b'{"argv":[]}'),
            hello() + numbered(1, protocol.EXEC, b'{"argv":["true"]}', session=0),
            hello() + numbered(1, protocol.EXEC, b'{"argv":["true"]}', ack=99),
            hello() + numbered(1, protocol.FREEZE, b"?", session=0),
            hello() + unnumbered(protocol.EXEC, b"{}"),
            hello()
            + numbered(1, protocol.EXEC, b'{"argv":["sleep","9"],"stdin":true}')
            + b"".join(numbered(n, protocol.STDIN, bytes(PAYLOAD_MAX)) for n in range(2, 30)),
            hello()
            + numbered(1, protocol.EXEC, b'{"argv":["sleep","9"]}')
            + numbered(2, protocol.CREDIT, protocol.encode_credit(1, 2**32 - 1)),
            hello()
            + b"".join(
                encode(Frame(protocol.EXEC, protocol.MORE, 1, n, 0, bytes(PAYLOAD_MAX)))
                for n in range(1, 60)
            ),
        ]
        for data in rude:
            await rude_host(agent, data)
            assert agent.alive
        async with attached(agent) as link:
            assert (await run(link, "echo", "well"))[0] == b"well\n"
        assert agent.rss_bytes() < 16 * MIB

    play(scene())


def test_a_host_that_never_reads_costs_the_agent_bounded_memory(agent: Agent) -> None:
    async def scene() -> None:
        sock = await agent.connect()
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        request = b'{"argv":["yes"]}'
        commands = b"".join(numbered(n, protocol.EXEC, request, session=n) for n in range(1, 33))
        await loop.sock_sendall(sock, hello() + commands)
        async with asyncio.timeout(20):
            while len(agent.children()) < 32:
                await asyncio.sleep(0.01)
        sock.close()
        async with attached(agent) as link:
            assert (await run(link, "true"))[2] == Exit(0)
        assert agent.rss_bytes() < 16 * MIB

    play(scene())


def test_a_greeting_hidden_in_data_changes_nothing(agent: Agent) -> None:
    async def scene() -> None:
        trap = bytes(PAYLOAD_MAX) + hello("stolen") + bytes(PAYLOAD_MAX)
        async with attached(agent) as link:
            out, _, _ = await run(link, "cat", stdin=trap * 20)
            assert out == trap * 20

    play(scene())


def test_the_decoder_on_both_ends_has_room_for_two_frames() -> None:
    with pytest.raises(AssertionError):
        Decoder(FRAME_MAX)
