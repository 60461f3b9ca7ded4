"""A guest that stands and that nobody owns goes on as soon as its VMM answers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from diapause.errors import VmmTimeout
from diapause.model import CaptureRequest, RunRequest
from diapause.sandbox.engine import Engine
from diapause.sandbox.rescue import thaw_when_it_answers
from diapause.store.home import Home
from diapause.units import MIB
from tests.framework.fake_home import eventually

pytestmark = pytest.mark.vm


@pytest.fixture
def engine(tiny_home: Home) -> Iterator[Engine]:
    """An engine in this process, so that its parts can be reached."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    opened = Engine.open(tiny_home, loop)
    try:
        yield opened
    finally:
        opened.remove([row.sandbox for row in opened.sandboxes(True)], force=True)
        opened.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def test_a_vmm_that_hung_with_its_guest_stopped_is_thawed(engine: Engine) -> None:
    """It does not answer at first (it is stopped from outside); when it does, the guest goes on."""
    ran = engine.run(RunRequest(memory_bytes=128 * MIB, disk_bytes=64 * MIB, boot=True))
    machine = engine.host.guests[ran.sandbox].machine
    assert machine is not None
    machine.stop()
    os.kill(machine.process.pid, signal.SIGSTOP)
    rescued: list[bool] = []
    watcher = threading.Thread(
        target=lambda: rescued.append(thaw_when_it_answers(engine.host, ran.sandbox))
    )
    watcher.start()
    assert watcher.is_alive()
    os.kill(machine.process.pid, signal.SIGCONT)
    watcher.join(60)
    assert rescued == [True]
    assert machine.status() == "running"
    assert engine.save(ran.sandbox, CaptureRequest()).dirty_source == "private"


def test_it_asks_again_after_a_bound_and_gives_up_on_a_guest_that_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound is not an answer; a VMM that is gone is its watcher's."""
    ran = engine.run(RunRequest(memory_bytes=128 * MIB, disk_bytes=64 * MIB, boot=True))
    machine = engine.host.guests[ran.sandbox].machine
    assert machine is not None
    machine.stop()
    bounds = iter([VmmTimeout(sandbox=ran.sandbox, step="query-status", bound_s=20)] * 2)
    status = type(machine).status

    def slow(self: object) -> str:
        if (error := next(bounds, None)) is not None:
            raise error
        return status(machine)

    monkeypatch.setattr(type(machine), "status", slow)
    assert thaw_when_it_answers(engine.host, ran.sandbox)
    assert status(machine) == "running"
    os.kill(machine.process.pid, signal.SIGKILL)
    eventually("its end", lambda: ran.sandbox not in engine.host.guests)
    assert not thaw_when_it_answers(engine.host, ran.sandbox)
    assert engine.inspect(ran.sandbox).state == "failed"
