"""Guests that end by themselves, guests without an agent, VMMs that somebody kills."""

from __future__ import annotations

import os
import re
import signal

import pytest

from diapause.errors import DiapauseError, WrongState
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox

pytestmark = pytest.mark.vm

# Each ends the guest a moment after the exec that asked for it.
ENDS = {
    "poweroff": ("poweroff -f", "guest-shutdown"),
    "reboot": ("reboot -f", "guest-reset"),
    "panic": ("echo c >/proc/sysrq-trigger", "guest-panic"),
}
# Init goes on respawning what is a directory now.
NO_AGENT = """
mount -t tmpfs none /sbin
for p in $(pidof diapause-agent); do kill -9 $p; done
"""

COUNT_ON_CONSOLE = """
i=0
while :; do i=$((i+1)); echo; echo "count $i"; usleep 200000; done >/dev/console
"""


@pytest.mark.parametrize("how", ENDS)
def test_a_guest_that_ends_is_stopped_with_its_reason(
    daemon: Daemon, guest: Sandbox, how: str
) -> None:
    """The reason is in inspect; nothing of it runs; a verb says what to do instead."""
    script, reason = ENDS[how]
    saved = guest.save()
    guest.in_background(f"usleep 200000; {script}")
    eventually(f"the end by {how}", lambda: guest.state == "stopped", WAIT_S)
    found = guest.inspect()
    assert (found.reason, found.vmm, found.error) == (reason, None, None)
    eventually("the end of the VMM", lambda: len(daemon.vmms()) == 1)
    with pytest.raises(WrongState) as refused:
        guest.pause()
    assert saved.snapshot in refused.value.advice
    with pytest.raises(WrongState):
        guest.exec("true")
    with guest.forked(saved.snapshot) as fork:
        assert fork.sh("echo up").strip() == "up"


def test_an_exec_that_runs_when_the_guest_ends_is_cut(guest: Sandbox) -> None:
    """Never silently short: the error names what happened."""
    stream = guest.stream("sh", "-c", "echo began; poweroff -f; sleep 1000")
    with pytest.raises(DiapauseError) as cut:
        stream.finish()
    assert cut.value.exit_code == 125
    assert stream.out in (b"", b"began\n")


def test_a_vmm_killed_from_outside_is_a_failure_with_a_cause(guest: Sandbox) -> None:
    """Failed, and inspect says why."""
    os.kill(guest.vmm_pid, signal.SIGKILL)
    eventually("the failure", lambda: guest.state == "failed", WAIT_S)
    found = guest.inspect()
    assert found.vmm is None
    assert found.error is not None
    assert found.error["code"] == "guest_lost"
    assert "has ended" in found.error["message"]


def test_a_vmm_killed_in_a_pause(guest: Sandbox) -> None:
    """The pause fails or is whole; the sandbox is never stuck."""
    stopped = guest.vmm_pid
    os.kill(stopped, signal.SIGSTOP)
    os.kill(stopped, signal.SIGKILL)
    with pytest.raises(DiapauseError):
        guest.pause()
    eventually("the failure", lambda: guest.state == "failed", WAIT_S)


def test_a_guest_without_an_agent_is_paused_and_resumed(guest: Sandbox) -> None:
    """Both work, and the resume says what was not done; the guest counts on its console."""
    guest.in_background(f"usleep 300000; {NO_AGENT}\n{COUNT_ON_CONSOLE}")
    eventually("the end of the agent", lambda: _is_mute(guest), WAIT_S)
    eventually("the first values", lambda: len(_values(guest)) > 2, WAIT_S)
    paused = guest.pause()
    assert paused.dirty_pages > 0
    before = _values(guest)
    resumed = guest.resume()
    assert resumed.warm
    assert any("agent" in note for note in resumed.notes), resumed.notes
    assert any("Clock, entropy and identity" in note for note in resumed.notes)
    assert guest.state == "running"
    eventually("more values", lambda: len(_values(guest)) > len(before) + 2, WAIT_S)
    after = _values(guest)
    assert after == list(range(1, len(after) + 1))
    assert guest.pause().snapshot != paused.snapshot


def _values(guest: Sandbox) -> list[int]:
    """What the guest has counted on its console, a value in a whole line."""
    whole = _console(guest).rpartition("\n")[0]
    return [int(found) for found in re.findall(r"^count (\d+)\r?$", whole, re.MULTILINE)]


def _console(guest: Sandbox) -> str:
    path = guest.daemon.home.sandbox(guest.id) / "console.log"
    return path.read_text(errors="replace") if path.exists() else ""


def _is_mute(guest: Sandbox) -> bool:
    """Whether init has failed to start the agent again, as its console says."""
    return "diapause-agent: not found" in _console(guest)
