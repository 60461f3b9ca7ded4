"""The host went down: another boot id, an empty tmpfs, and what was not synced torn or zeroed."""

from __future__ import annotations

import os
import shutil
import signal
import uuid

import pytest

from diapause.driver.process import find_by_argument
from diapause.driver.qemu.command import name_start
from tests.framework import coupled
from tests.framework.fake_home import eventually, gone
from tests.framework.leftovers import nothing_left
from tests.framework.sandbox import WAIT_S, Sandbox
from tests.framework.verbs import Ground

pytestmark = pytest.mark.vm


def reboot(ground: Ground, torn: str) -> None:
    """The daemon is gone: end every VMM, lose what nobody synced, come back as another boot."""
    daemon, home = ground.daemon, ground.daemon.home
    assert gone(daemon.pid)
    pids = [process.pid for process in find_by_argument(name_start(home.key))]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually("the end of the VMMs", lambda: all(gone(pid) for pid in pids), WAIT_S)
    shutil.rmtree(home.buffers)
    shutil.rmtree(home.sockets)
    # Flat files and the running overlays are never synced; a file keeps its name and loses bytes.
    for path in [*home.flat.glob("*/*"), *home.sandboxes.glob("*/*.qcow2")]:
        size = path.stat().st_size
        path.chmod(0o600)
        os.truncate(path, 0 if torn == "zeroed" else size // 2)
        os.truncate(path, size if torn == "zeroed" else size // 2)
    daemon.boot_again(str(uuid.uuid4()))
    home.create()


@pytest.mark.parametrize("torn", ["zeroed", "truncated"])
def test_what_was_synced_is_resumed_and_the_rest_is_said_to_be_lost(
    ground: Ground, torn: str
) -> None:
    """A durable pause, one that was not, and a guest that ran."""
    durable, quick, running = ground.fork(), ground.fork(), ground.fork()
    value, digests = coupled.check(durable), durable.rewrite(64)
    kept = durable.pause("disk").snapshot
    whole = quick.save("disk").snapshot
    ground.daemon.packed(whole)
    last = running.save("disk").snapshot
    lost = _paused_to_memory_alone(ground, quick)
    reboot(ground, torn)

    states = {row.sandbox: row.state for row in ground.daemon.client.sandboxes(everything=True)}
    assert states[durable.id] == "paused"
    assert (states[quick.id], states[running.id]) == ("failed", "failed")
    for guest, named in ((quick, whole), (running, last)):
        error = guest.inspect().error
        assert error is not None
        assert error["code"] == "guest_lost"
        assert "lost with the host" in error["message"]
        assert named in error["message"]
    found = ground.daemon.client.inspect_snapshot(lost)
    assert found.state == "failed"
    assert found.error is not None
    assert "lost with the host" in found.error["message"]
    durable.resume()
    assert durable.digests() == digests
    coupled.goes_on(durable, value)
    for snapshot in (kept, whole, last):
        with durable.forked(snapshot) as fork:
            coupled.check(fork)
    nothing_left(ground.daemon.home)
    for guest in (durable, quick, running):
        guest.remove()


def _paused_to_memory_alone(ground: Ground, guest: Sandbox) -> str:
    """Pause without syncing, and go down before it is packed, which would sync it."""
    ground.daemon.dies_at("pause/publish/acted", guest.pause)
    rows = ground.daemon.record(guest.id)
    assert rows.snapshot is not None
    return rows.snapshot
