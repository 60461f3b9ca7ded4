"""A guest is greeted whatever became of the link that it had."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from diapause.errors import AgentRefused, AgentUnreachable
from diapause.guest import protocol
from diapause.guest.greeting import Greeting
from diapause.guest.link import Link
from diapause.guest.protocol import Welcome
from diapause.sandbox.guests import Guest
from diapause.sandbox.start import Start


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join(10)
    made.close()


def test_a_link_that_was_closed_before_a_pause_does_not_end_every_resume(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent had stopped answering: that was then."""
    closed, greeted = Link("test"), []

    async def attach(self: Link, *_: object, **__: object) -> str:
        assert not self.cause
        greeted.append(self)
        return "welcome"

    monkeypatch.setattr(Link, "attach", attach)
    closed.cause = "the guest's agent stopped answering"
    guest = Guest("test", loop, closed)
    guest.machine = cast("Any", SimpleNamespace(agent_socket=lambda bound_s: None))
    answered: object = guest.greet(None, 5.0)
    assert answered == "welcome"
    assert greeted == [guest.link] != [closed]


@pytest.mark.parametrize("warm", [True, False])
def test_an_agent_that_breaks_the_protocol_is_no_agent(warm: bool) -> None:
    """A guest that was resumed goes on, and the answer says so; a boot fails."""
    refused = AgentRefused(sandbox="test", what="the host", cause="a test")

    def greet(identity: object, bound_s: float) -> None:
        raise refused

    machine = SimpleNamespace(alive=lambda: True)
    verb: Any = SimpleNamespace(
        record=SimpleNamespace(agent=True), state=object() if warm else None, notes=[],
        guest=SimpleNamespace(greet=greet, machine=machine), identity=lambda: None,
    )  # fmt: skip
    verb._without_agent = lambda error, warm: Start._without_agent(verb, error, warm)
    if warm:
        Start.do_greet(verb)
        assert "refused" in verb.notes[0]
    else:
        with pytest.raises(AgentRefused):
            Start.do_greet(verb)


def test_who_asks_while_a_guest_is_being_greeted_does_not_end_the_greeting(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port takes one connection: an exec right after an adoption waits for the adoption's."""
    attached: list[Link] = []

    async def attach(self: Link, *_: object, **__: object) -> str:
        await asyncio.sleep(0.05)  # long enough for the other to come
        attached.append(self)
        return "welcome"

    monkeypatch.setattr(Link, "attach", attach)
    monkeypatch.setattr(Link, "attached", property(lambda link: link in attached))
    guest = Guest("test", loop)
    guest.machine = cast("Any", SimpleNamespace(agent_socket=lambda bound_s: None))
    asked = asyncio.run_coroutine_threadsafe(guest.answering_link(5.0), loop)
    guest.reconnect(5.0)
    assert asked.result(5.0) is guest.link
    assert attached == [guest.link]


def test_a_vmm_that_takes_no_connections_does_not_hold_up_the_daemon() -> None:
    """Only whoever asked for its agent waits."""

    async def scene() -> None:
        hung = threading.Event()

        def agent_socket(bound_s: float) -> None:
            assert hung.wait(bound_s)
            raise AgentUnreachable(sandbox="test", bound_s=bound_s)

        guest = Guest("test", asyncio.get_running_loop())
        guest.machine = cast("Any", SimpleNamespace(agent_socket=agent_socket))
        asked = asyncio.create_task(guest.answering_link(20.0))
        await asyncio.sleep(0.05)  # the loop goes on
        assert not asked.done()
        hung.set()
        with pytest.raises(AgentUnreachable):
            await asked

    asyncio.run(scene())


def _welcome(realtime_ns: int) -> Welcome:
    return Welcome(
        protocol=protocol.PROTOCOL, nonce="", version="1", boot_id="b", incarnation="i", epoch=1,
        resumed=False, received=0, realtime_ns=realtime_ns, monotonic_ns=0, pid=1, failed=[],
    )  # fmt: skip


def _greeting(monkeypatch: pytest.MonkeyPatch, took_s: float) -> list[bool]:
    """One whose agent takes so long each time and is as far behind; what was made of the answers
    until one was good enough."""
    now, judged = [1e9], list[bool]()
    clock = SimpleNamespace(time_ns=lambda: int(now[0] * 1e9), monotonic=lambda: now[0])
    monkeypatch.setattr("diapause.guest.greeting.time", clock)
    greeting = Greeting("link", 0, None)
    while not judged or (not judged[-1] and len(judged) < 20):
        for message in greeting.hello():
            message()
        now[0] += took_s
        judged.append(greeting.judge(_welcome(int((now[0] - took_s / 2) * 1e9))))
        assert greeting.later() >= min(2 * took_s, 10.0), "a repeat before its answer can come"
    return judged


@pytest.mark.parametrize(("took_s", "exchanges"), [(0.01, 1), (0.5, 8), (3.0, 2), (9.0, 1)])
def test_a_slow_agent_is_given_time_and_believed_within_a_bound(
    monkeypatch: pytest.MonkeyPatch, took_s: float, exchanges: int
) -> None:
    """The more an exchange takes the fewer of them there are until the likeliest error decides."""
    judged = _greeting(monkeypatch, took_s)
    assert judged == [False] * (exchanges - 1) + [True]
