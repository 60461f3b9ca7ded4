"""A guest that stands and that nobody owns goes on as soon as its VMM answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diapause.driver.qemu import frozen
from diapause.errors import CaptureFailed, StorageFailed, VmmTimeout
from diapause.model import CaptureRequest, ForkRequest, RunRequest
from diapause.sandbox.engine import Engine
from diapause.sandbox.guests import Guest
from diapause.sandbox.rescue import go_on_after_stall, thaw_when_it_answers
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


@pytest.fixture
def running(engine: Engine) -> Guest:
    ran = engine.run(RunRequest(memory_bytes=128 * MIB, disk_bytes=64 * MIB, boot=True))
    return engine.host.guests[ran.sandbox]


class Once:
    """Fails the first time that it is called, and does what it stands for afterwards."""

    def __init__(self, error: Exception, act: Callable[..., Any]) -> None:
        self.error: Exception | None = error
        self.act = act

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.act(*arguments, **named)


def _state(engine: Engine, guest: Guest) -> str:
    """As the row has it: no verb is asked, which would settle it."""
    record = engine.host.catalog.sandbox(guest.sandbox)
    assert record is not None
    return record.state


def test_an_end_is_heard_over_a_broken_connection(engine: Engine, running: Guest) -> None:
    """QEMU goes on with its guest's machine stopped: only its monitor says that the guest ended."""
    assert running.machine is not None
    path = str(running.machine.paths.events)
    [ours] = [fd for fd, peer in _unix_peers() if peer == path]
    connection = socket.socket(fileno=os.dup(ours))
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    running.machine.checked("system_reset")  # started with -no-reboot: its guest has shut down
    eventually("the end of the guest", lambda: _state(engine, running) == "stopped", 60)


def _unix_peers() -> Iterator[tuple[int, str]]:
    """This process's descriptors that are connected to a socket with a path."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as found:
                if found.family == socket.AF_UNIX and isinstance(peer := found.getpeername(), str):
                    yield int(entry.name), peer


def test_an_end_whose_row_could_not_be_written_is_written_later(
    engine: Engine, running: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert running.machine is not None
    refused = Once(StorageFailed(what="the catalog", cause="EIO"), engine.host.end)
    monkeypatch.setattr(engine.host, "end", refused)
    os.kill(running.machine.process.pid, signal.SIGKILL)
    eventually("the end of the guest", lambda: _state(engine, running) == "failed", 60)
    assert refused.error is None
    assert running.sandbox not in engine.host.guests


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("unable to open"), OSError(errno.EMFILE, "too many")]
)
def test_a_stall_is_ended_whatever_fails_once(
    engine: Engine, running: Guest, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    assert running.machine is not None
    with engine.host.locks.hold(running.sandbox):
        running.machine.stop()
        running.stalled = "no space"
    monkeypatch.setattr(engine.host.catalog, "sandbox", Once(error, engine.host.catalog.sandbox))
    go_on_after_stall(engine.host, running, "no space")
    assert running.machine.status() == "running"
    assert running.stalled is None


def test_what_could_not_be_packed_is_packed_later(
    engine: Engine, running: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Once(StorageFailed(what="a build", cause="EIO"), engine.host.packer.pack)
    monkeypatch.setattr(engine.host.packer, "pack", refused)
    saved = engine.save(running.sandbox, CaptureRequest()).snapshot
    eventually("its packing", lambda: engine.inspect_snapshot(saved).state == "packed", 60)
    assert refused.error is None
