"""A guest that stands and that nobody owns goes on as soon as its VMM answers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from diapause.driver.qemu import frozen
from diapause.errors import CaptureFailed, VmmTimeout
from diapause.model import CaptureRequest, ForkRequest, RunRequest
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
    with engine.host.locks.hold(ran.sandbox):  # or the engine thaws it before it is hung
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
    with engine.host.locks.hold(ran.sandbox):
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


@pytest.mark.parametrize("step", ["stop", "_save_state"])
def test_a_section_that_fails_leaves_no_node_that_is_not_in_use(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before the switch the next overlay is dropped; after it the disk goes on in it."""
    ran = engine.run(RunRequest(memory_bytes=128 * MIB, disk_bytes=64 * MIB, boot=True))
    machine = engine.host.guests[ran.sandbox].machine
    assert machine is not None

    def nodes() -> int:
        return len(machine.checked("query-named-block-nodes"))

    def refuse(*_: object) -> None:
        raise VmmTimeout(sandbox=ran.sandbox, step=step, bound_s=20)

    before = nodes()
    with monkeypatch.context() as patch:
        patch.setattr(machine if step == "stop" else frozen, step, refuse)
        with pytest.raises(CaptureFailed):
            engine.save(ran.sandbox, CaptureRequest())
    assert nodes() == (before if step == "stop" else before + 2)
    assert machine.status() == "running"
    saved = engine.save(ran.sandbox, CaptureRequest())
    assert nodes() == (before + 2 if step == "stop" else before + 4)
    forked = engine.fork(ForkRequest(source=saved.snapshot, count=1))
    assert len(forked.sandboxes) == 1
