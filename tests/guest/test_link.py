"""The link through cuts, forks and restarts of the agent: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from diapause import errors
from diapause.guest.link import Link
from diapause.guest.protocol import FRAME_MAX, Identity
from diapause.guest.session import ExecRequest, Exit, Output, Session
from diapause.units import KIB, MIB
from tests.framework.agent import Agent, attached, finish, run
from tests.framework.cutting import CuttingProxy

BOUND_S = 120.0


def play(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, BOUND_S))


async def echo(session: Session, data: bytes) -> bytes:
    """Sends data through a command that gives it back."""
    back = bytearray()

    async def feed() -> None:
        for at in range(0, len(data), 50_000):
            await session.write(data[at : at + 50_000])
        await session.end_input()

    async def take() -> None:
        async for item in session:
            if isinstance(item, Exit):
                assert item == Exit(0)
                return
            back.extend(item.data)

    await asyncio.gather(feed(), take())
    return bytes(back)


@pytest.mark.parametrize("seed", range(3))
def test_cuts_at_any_byte_lose_and_double_nothing(agent: Agent, seed: int) -> None:
    async def scene() -> None:
        dice = random.Random(seed)
        proxy = CuttingProxy(agent)
        link = Link("test")
        streams = [dice.randbytes(6 * MIB) for _ in range(2)]
        await link.attach(await proxy.connect(4 * FRAME_MAX), identity=None, bound_s=10)
        sessions = [await link.exec(ExecRequest(argv=["cat"])) for _ in streams]
        work = asyncio.gather(
            *(echo(session, data) for session, data in zip(sessions, streams, strict=True))
        )
        cuts = 0
        while not work.done():
            cut = asyncio.create_task(proxy.cut.wait())
            waiting: list[asyncio.Future[Any]] = [cut, work]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            cut.cancel()
            if work.done():
                break
            cuts += 1
            if dice.random() < 0.5:
                await link.detach()
            await proxy.hang_up()
            # Some connections end before the greeting is through.
            after = FRAME_MAX + dice.choice([dice.randrange(2000), dice.randrange(900 * KIB)])
            sock = await proxy.connect(after)
            try:
                await link.attach(sock, identity=None, bound_s=0.2)
            except errors.AgentUnreachable:
                proxy.cut.set()
        for back, data in zip(await work, streams, strict=True):
            assert len(back) == len(data)
            assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
        assert cuts >= 20
        link.close("done")
        await proxy.hang_up()

    play(scene())


def test_a_detached_session_waits_and_goes_on(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            session = await link.exec(ExecRequest(argv=["cat"]))
            await session.write(b"one")
            assert await anext(session) == Output(1, b"one")
            await link.detach()
            assert not link.attached
            waiting = asyncio.ensure_future(anext(session))
            await session.write(b"two")
            assert not waiting.done()
            welcome = await link.attach(await agent.connect(), identity=None, bound_s=10)
            assert welcome.resumed
            assert await waiting == Output(1, b"two")
            await session.end_input()
            assert await anext(session) == Exit(0)

    play(scene())


def test_output_waits_for_the_next_connection(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            session = await link.exec(ExecRequest(argv=["sh", "-c", "read x; seq 300000; exit 9"]))
            await session.write(b"go\n")
            await link.detach()
            await link.attach(await agent.connect(), identity=None, bound_s=10)
            out, _, end = await finish(session)
            assert out == "".join(f"{n}\n" for n in range(1, 300001)).encode()
            assert end == Exit(9)

    play(scene())


def test_a_session_whose_sandbox_never_comes_back_is_cut_with_the_cause(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            session = await link.exec(ExecRequest(argv=["sleep", "1000"]))
            await link.detach()
            waiting = asyncio.ensure_future(anext(session))
            writing = asyncio.ensure_future(session.write(bytes(4 * MIB)))
            await asyncio.sleep(0)
            link.close("the sandbox was removed")
            for task in (waiting, writing):
                with pytest.raises(errors.ExecCut, match="the sandbox was removed"):
                    await task
            with pytest.raises(errors.ExecCut):
                await link.exec(ExecRequest(argv=["true"]))

    play(scene())


def test_a_fork_detaches_the_originals_sessions(agent: Agent, tmp_path: Path) -> None:
    async def scene() -> None:
        done = tmp_path / "done"
        original = Link("original")
        await original.attach(await agent.connect(), identity=None, bound_s=10)
        script = f"cat; seq 1000000; echo over > {done}; exec sleep 1000"
        session = await original.exec(ExecRequest(argv=["sh", "-c", script]))
        terminal = await original.exec(ExecRequest(argv=["sh", "-c", "read x"], tty=True))
        await session.write(b"before")
        assert await anext(session) == Output(1, b"before")
        await original.detach()

        async with attached(agent) as fork:
            async with asyncio.timeout(20):
                while not done.exists():  # its input came to its end, its output blocks nowhere
                    await asyncio.sleep(0.01)
            assert (await run(fork, "echo", "mine"))[0] == b"mine\n"
            assert session.pid in agent.children()
            assert terminal.pid in agent.children()
        original.close("it was forked")
        with pytest.raises(errors.ExecCut, match="it was forked"):
            await finish(session)

    play(scene())


def test_a_link_that_the_agent_replaced_is_cut_when_it_comes_back(agent: Agent) -> None:
    async def scene() -> None:
        first = Link("first")
        await first.attach(await agent.connect(), identity=None, bound_s=10)
        session = await first.exec(ExecRequest(argv=["cat"]))
        await session.write(b"x")
        assert await anext(session) == Output(1, b"x")
        await first.detach()
        async with attached(agent) as second:
            assert (await run(second, "true"))[2] == Exit(0)
        await first.attach(await agent.connect(), identity=None, bound_s=10)
        with pytest.raises(errors.ExecCut, match="does not know"):
            await finish(session)
        assert (await run(first, "echo", "again"))[0] == b"again\n"
        first.close("done")

    play(scene())


def test_a_restarted_agent_cuts_its_sessions_with_the_cause(agent: Agent) -> None:
    async def scene() -> None:
        async with attached(agent) as link:
            session = await link.exec(ExecRequest(argv=["cat"]))
            await session.write(b"x")
            assert await anext(session) == Output(1, b"x")
            children = agent.children()
            agent.kill()
            agent.start()
            await link.attach(await agent.connect(), identity=None, bound_s=10)
            with pytest.raises(errors.ExecCut, match="was restarted"):
                await finish(session)
            assert (await run(link, "echo", "new"))[0] == b"new\n"
            for child in children:
                os.killpg(child, signal.SIGKILL)

    play(scene())


def test_an_agent_that_does_not_answer_is_an_error_within_its_bound(tmp_path: Path) -> None:
    async def scene() -> None:
        ours, theirs = socket.socketpair()
        link = Link("test")
        with pytest.raises(errors.AgentUnreachable):
            await link.attach(ours, identity=None, bound_s=0.3)
        assert not link.attached
        theirs.close()
        ours, theirs = socket.socketpair()
        theirs.close()
        with pytest.raises(errors.AgentUnreachable):
            await link.attach(ours, identity=None, bound_s=30)

    play(scene())


def test_the_greeting_proves_the_clock_and_names_what_failed(agent: Agent) -> None:
    async def scene() -> None:
        link = Link("test")
        wrong = Identity(hostname="a/b", machine_id="short")
        welcome = await link.attach(await agent.connect(), identity=wrong, bound_s=10)
        assert welcome.clock_error_ms <= 100
        assert [cause.partition(":")[0] for cause in welcome.failed] == ["identity"]
        assert welcome.pid == agent.pid
        link.close("done")

    play(scene())
