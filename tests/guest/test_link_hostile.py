"""The host's end of a link against any stream of an agent's frames: bounded, typed, alone.

First the files of ``corpus/link``, each a stream that comes after a good greeting; then streams
made of generated frames and mutated.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import struct
import termios
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diapause import errors
from diapause.guest import outbox, protocol
from diapause.guest.frames import Frame, encode, unnumbered
from diapause.guest.link import Link
from diapause.guest.protocol import PAYLOAD_MAX, STREAM_WINDOW
from diapause.guest.session import ExecRequest, Exit, Output, Session
from diapause.units import KIB
from tests.guest.test_hostile import BOUND_S, FalseAgent

CORPUS = sorted((Path(__file__).parent / "corpus" / "link").iterdir())


def play(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a scene in which nothing may be raised out of a callback."""

    async def watched() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(context)
        )
        await asyncio.wait_for(coroutine, BOUND_S)
        assert failures == []

    asyncio.run(watched())


class Pair:
    """A link with one command, and its false agent."""

    def __init__(self, agent: FalseAgent, link: Link, session: Session) -> None:
        self.agent, self.link, self.session = agent, link, session

    @classmethod
    async def begin(cls) -> Pair:
        agent, link = FalseAgent(), Link("test")
        await link.attach(agent.near, identity=None, bound_s=BOUND_S)
        return cls(agent, link, await link.exec(ExecRequest(argv=["x"])))

    async def send(self, stream: bytes) -> None:
        """Returns when the link has taken every byte or has let go of its socket."""
        sending = asyncio.create_task(self._send(stream))
        while not sending.done() or self._unread():
            await asyncio.sleep(0)
        await sending

    async def _send(self, stream: bytes) -> None:
        with contextlib.suppress(OSError):  # a link that has ended does not read
            await self.agent.send(stream)

    def _unread(self) -> int:
        fd = self.agent.near.fileno()
        if fd < 0:
            return 0
        answer = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
        return int(struct.unpack("i", answer)[0])

    def check_bounds(self) -> None:
        """What a guest can fill is within its limit."""
        link, session = self.link, self.session
        assert len(link._decoder._buffer) == 256 * KIB
        assert len(link._urgent) <= 4
        assert len(link._outbox._frames) <= outbox.FRAMES_MAX
        assert link._outbox._bytes <= outbox.WINDOW + protocol.FRAME_MAX
        assert sum(len(piece.data) for piece in session._pieces) <= 2 * STREAM_WINDOW + KIB
        assert len(session._pieces) < 1100
        assert set(link._sessions) <= {session.number}
        assert not link._closing

    async def end(self) -> Exit | errors.DiapauseError:
        """How the command ends, the link closed: an exit or one typed error."""
        self.link.close("the test is over")
        try:
            async for item in self.session:
                if isinstance(item, Exit):
                    return item
                assert isinstance(item, Output)
        except errors.DiapauseError as error:
            return error
        finally:
            await self.agent.stop()
        raise AssertionError("the command's stream ended without its end")


async def survives(stream: bytes) -> Exit | errors.DiapauseError:
    """Send it to one of two links; the other goes on."""
    hostile, other = await Pair.begin(), await Pair.begin()
    await hostile.send(stream)
    hostile.check_bounds()
    end = await hostile.end()
    assert isinstance(end, Exit) or end.message.isprintable()
    assert not other.link.cause
    said = encode(Frame(protocol.STDOUT, 0, 1, 1, 0, b"well"))
    exited = encode(Frame(protocol.EXIT, 0, 1, 2, 0, b'{"code":0,"signal":null}'))
    await other.send(said + exited)
    assert [item async for item in other.session] == [Output(1, b"well"), Exit(0)]
    other.link.close("done")
    await other.agent.stop()
    return end


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_the_corpus_breaks_nothing(file: Path) -> None:
    async def scene() -> None:
        end = await survives(file.read_bytes())
        # A file says in its name what becomes of the command.
        kind = "exit" if isinstance(end, Exit) else type(end).__name__
        broke = "protocol" in getattr(end, "message", "")
        assert file.name.startswith(
            {"exit": "exit", "ExecCut": "broken" if broke else "ignored"}[kind]
        )

    play(scene())


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 12


KINDS = st.sampled_from([*range(0, 9), *range(16, 26), *range(31, 43), 255])
OUTPUT = st.sampled_from([protocol.STDOUT, protocol.STDERR, protocol.STARTED])
JSON = st.sampled_from([
    b"{}", b'{"id":1}', b'{"pid":1}', b"[]", b'{"code":0,"signal":null}', b'{"cause":"\\u001b[2J"}',
    b'{"pid":%d}' % 10**400, b'{"x":' + b"[" * 5000, b'{"pid":1,"x":"\\ud800"}', b"\xff",
    b'{"what":"limit","errno":1,"message":"\\u202e"}', b'{"id":1,"mounts":[],"failed":["\\u0007"]}',
])  # fmt: skip
PAYLOADS = st.binary(max_size=60) | JSON | st.sampled_from([1, 1000, PAYLOAD_MAX]).map(bytes)
# Mostly what is due, so that most frames are looked into and not only at.
STEPS = st.sampled_from([1, 1, 1, 1, 1, 0, 2, -1]) | st.integers(-(2**63), 2**63)
PLANS = st.lists(
    st.tuples(
        OUTPUT | KINDS, st.integers(0, 255), st.sampled_from([1, 1, 1, 0, 2, 2**32 - 1]), STEPS,
        st.sampled_from([0, 0, 0, 1, 2, 2**64 - 1]), PAYLOADS,
    ),
    max_size=24,
)  # fmt: skip


def made(plan: list[tuple[int, int, int, int, int, bytes]]) -> list[bytes]:
    frames, seq = [], 0
    for kind, flags, session, step, ack, payload in plan:
        number = (seq + step) % 2**64
        if step == 1:
            seq = number
        if 0 < kind <= protocol.LAST_UNNUMBERED:
            number = 0
        frames.append(encode(Frame(kind, flags, session, number, ack, payload)))
    return frames


def flip(frames: list[bytes], at: int) -> list[bytes]:
    index = at % len(frames)
    frame = bytearray(frames[index])
    frame[at % len(frame)] ^= 1 << at % 8
    return [*frames[:index], bytes(frame), *frames[index + 1 :]]


def truncate(frames: list[bytes], at: int) -> list[bytes]:
    index = at % len(frames)
    return [*frames[:index], frames[index][: at % len(frames[index])], *frames[index + 1 :]]


def double(frames: list[bytes], at: int) -> list[bytes]:
    return [*frames, frames[at % len(frames)]]


def turn(frames: list[bytes], at: int) -> list[bytes]:
    index = at % len(frames)
    return frames[index:] + frames[:index]


def pad(frames: list[bytes], at: int) -> list[bytes]:
    index = at % len(frames)
    return [*frames[:index], bytes(at % 100_000), *frames[index:]]


def lengthen(frames: list[bytes], at: int) -> list[bytes]:
    """A header that promises more than any frame may have."""
    index = at % len(frames)
    frame = frames[index]
    longer = frame[:8] + (PAYLOAD_MAX + 1 + at).to_bytes(4, "little") + frame[12:]
    return [*frames[:index], longer, *frames[index + 1 :]]


Mutation = Callable[[list[bytes], int], list[bytes]]
MUTATIONS: list[Mutation] = [flip, truncate, double, turn, pad, lengthen]
CHANGES = st.lists(st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 2**20)), max_size=3)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@example(plan=[(protocol.STARTED, 0, 1, 1, 0, b'{"pid":1}')], changes=[(pad, 99_999)])
@given(plan=PLANS, changes=CHANGES)
def test_no_sequence_of_frames_costs_more_than_its_link(
    plan: list[tuple[int, int, int, int, int, bytes]], changes: list[tuple[Mutation, int]]
) -> None:
    frames = made(plan)
    for change, at in changes if frames else []:
        frames = change(frames, at)
    stream = b"".join(frames)

    async def scene() -> None:
        await survives(stream)

    play(scene())


def test_a_guest_that_floods_and_never_reads_costs_one_acknowledgement() -> None:
    async def scene() -> None:
        pair = await Pair.begin()
        pair.agent._task.cancel()  # it reads no more
        started = b'{"pid":1}' + b" " * (PAYLOAD_MAX - 9)
        for seq in range(1, 1001):  # 32 MiB
            await pair.send(encode(Frame(protocol.STARTED, 0, 1, seq, 0, started)))
            pair.check_bounds()
        assert not pair.link.cause
        await pair.end()

    play(scene())


def test_a_guest_that_acknowledges_nothing_loses_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FRAMES_MAX", 64)

    async def scene() -> None:
        pair = await Pair.begin()
        reading = asyncio.create_task(_read(pair.session))
        for seq in range(1, 1001):
            await pair.send(encode(Frame(protocol.STDOUT, 0, 1, seq, 0, bytes(PAYLOAD_MAX))))
            pair.check_bounds()
            if pair.link.cause:
                break
        assert "it acknowledges nothing" in pair.link.cause
        with pytest.raises(errors.ExecCut, match="broke the protocol"):
            await reading
        await pair.agent.stop()

    play(scene())


async def _read(session: Session) -> None:
    async for _ in session:
        pass


GREETINGS: dict[str, Any] = {
    "a clock of 400 digits": {"realtime_ns": 10**400},
    "an epoch of 400 digits": {"epoch": 10**400},
    "a place below none": {"received": -1},
    "a process of 30 digits": {"pid": 10**30},
    "a name that is none": {"incarnation": 7},
}


@pytest.mark.parametrize("name", GREETINGS)
def test_a_greeting_with_a_number_that_is_none_is_no_greeting(name: str) -> None:
    async def scene() -> None:
        agent, link = FalseAgent(), Link("test")
        good = agent._welcome

        def bad(hello: dict[str, Any]) -> bytes:
            welcome = msgspec.json.decode(good(hello))
            welcome |= dict.fromkeys(GREETINGS[name], "@")
            text = msgspec.json.encode(welcome)
            for value in GREETINGS[name].values():
                text = text.replace(b'"@"', str(value).encode())
            return text

        agent._welcome = bad  # type: ignore[method-assign]
        with pytest.raises(errors.AgentUnreachable):
            await link.attach(agent.near, identity=None, bound_s=0.5)
        assert agent.hellos >= 1
        await agent.stop()

    play(scene())


def test_an_error_before_the_greeting_is_passed_over() -> None:
    async def scene() -> None:
        agent, link = FalseAgent(), Link("test")
        early = unnumbered(protocol.ERROR, b'{"cause":"x"}') + b"\xff" * 1000
        await agent.send(early)
        await link.attach(agent.near, identity=None, bound_s=BOUND_S)
        assert not link.cause
        link.close("done")
        await agent.stop()

    play(scene())
