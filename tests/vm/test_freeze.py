"""Frozen guests: they stand, keep their memory, and go on with nothing lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from diapause.errors import DiapauseError, WrongState
from tests.framework.catalog_tap import before_step
from tests.framework.clock import clock_error_s, uptime_s
from tests.framework.fake_home import eventually
from tests.framework.guest_exec import Follower
from tests.framework.kills import kill_at
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox

pytestmark = pytest.mark.vm

COUNT_ALOUD = "i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"
BUSY = "while :; do :; done"


def test_a_frozen_guest_stands_and_goes_on(guest: Sandbox) -> None:
    """Its processors use no time, its memory stays, its exec and its counter go on after."""
    guest.start_counter()
    guest.in_background(BUSY)
    followed = Follower(guest.stream("sh", "-c", COUNT_ALOUD))
    pid, digests, before = guest.vmm_pid, guest.rewrite(), guest.counted()
    frozen = guest.freeze()
    assert (frozen.frozen, frozen.already, guest.state) == (True, False, "frozen")
    assert guest.freeze().already
    used = _processor_ticks(pid)
    stood = _wait(1.0)
    assert _processor_ticks(pid) - used < stood * os.sysconf("SC_CLK_TCK") / 4
    assert guest.vmm_pid == pid
    thawed = guest.thaw()
    assert (thawed.frozen, thawed.notes, guest.state) == (False, [], "running")
    assert guest.thaw().already
    guest.counts_beyond(before)
    assert guest.digests() == digests
    lines = len(followed.lines)
    eventually("more of the exec", lambda: len(followed.lines) > lines, WAIT_S)
    followed.close()
    values = [int(line) for line in followed.lines]
    assert values == list(range(1, len(values) + 1))


def test_the_clock_is_set_by_the_thaw(guest: Sandbox) -> None:
    """The wall clock is right again; the monotonic one does not contain the freeze."""
    began, monotonic = time.monotonic(), uptime_s(guest)
    guest.freeze()
    stood = _wait(2.0)
    guest.thaw()
    assert clock_error_s(guest) <= 0.1
    passed, awake = uptime_s(guest) - monotonic, time.monotonic() - began - stood
    assert 0 <= passed <= awake + 0.05


def test_a_save_of_a_frozen_guest_leaves_it_frozen(guest: Sandbox) -> None:
    """Twice, so that tracking was armed while it stood; a fork of it runs."""
    guest.start_counter()
    value, digests = guest.counted(), guest.rewrite()
    guest.freeze()
    first = guest.save("disk", quiesce=True)
    assert any("frozen" in note for note in first.notes), first.notes
    second = guest.save()
    assert guest.state == "frozen"
    assert second.dirty_pages < first.dirty_pages
    for source in (first.snapshot, guest.id):
        with guest.forked(source) as fork:
            assert fork.state == "running"
            assert fork.digests() == digests
            fork.counts_beyond(value)
    assert guest.state == "frozen"
    guest.thaw()
    guest.counts_beyond(value)
    with guest.forked(guest.save().snapshot) as fork:
        assert fork.digests() == digests


def test_a_pause_of_a_frozen_guest(guest: Sandbox) -> None:
    """It is paused like any other, and a resume lets it run."""
    guest.start_counter()
    value, digests = guest.counted(), guest.rewrite()
    guest.freeze()
    guest.pause()
    assert guest.state == "paused"
    assert guest.resume().notes == []
    assert guest.state == "running"
    guest.counts_beyond(value)
    assert guest.digests() == digests


def test_verbs_that_need_it_running_name_thaw(daemon: Daemon, guest: Sandbox) -> None:
    """exec, resume, freeze of what is paused, rm without force."""
    guest.freeze()
    for verb in (lambda: guest.exec("true"), guest.resume):
        with pytest.raises(WrongState) as refused:
            verb()
        assert f"diapause thaw {guest.id}" in refused.value.advice
    with pytest.raises(WrongState):
        daemon.client.remove(guest.id)
    guest.pause()
    for standing in (guest.freeze, guest.thaw):
        with pytest.raises(WrongState) as refused:
            standing()
        assert f"diapause resume {guest.id}" in refused.value.advice
    guest.remove()
    with pytest.raises(DiapauseError):
        guest.thaw()


def test_a_frozen_guest_is_removed_by_force(daemon: Daemon, guest: Sandbox) -> None:
    """Its VMM is ended."""
    pid = guest.vmm_pid
    guest.freeze()
    guest.remove()
    eventually("the end of its VMM", lambda: pid not in daemon.vmms(), WAIT_S)


def test_a_vmm_that_is_killed_while_its_guest_is_frozen(guest: Sandbox) -> None:
    """Failed, with its cause, as a running one."""
    guest.freeze()
    os.kill(guest.vmm_pid, signal.SIGKILL)
    eventually("the failure", lambda: guest.state == "failed", WAIT_S)
    assert guest.inspect().vmm is None


def test_a_new_daemon_keeps_a_frozen_guest_frozen(daemon: Daemon, guest: Sandbox) -> None:
    """The row says so; the thaw is the next daemon's, clock and all."""
    guest.start_counter()
    value, pid = guest.counted(), guest.vmm_pid
    guest.freeze()
    for end in (daemon.kill, daemon.stop):
        end()
        assert (guest.state, guest.vmm_pid) == ("frozen", pid)
    used = _processor_ticks(pid)
    _wait(0.5)
    assert _processor_ticks(pid) - used < os.sysconf("SC_CLK_TCK") / 4
    assert guest.thaw().notes == []
    assert clock_error_s(guest) <= 0.1
    guest.counts_beyond(value)


def test_killed_in_a_pause_of_a_frozen_guest(daemon: Daemon, guest: Sandbox) -> None:
    """It is frozen as it was before."""
    guest.start_counter()
    value = guest.counted()
    guest.freeze()
    for verb, name in ((guest.pause, "pause"), (guest.save, "save")):
        kill_at(daemon, before_step(name, "keep"), verb)
        assert guest.state == "frozen"
    guest.thaw()
    guest.counts_beyond(value)


def _processor_ticks(pid: int) -> int:
    """Processor time of a process so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _wait(seconds: float) -> float:
    """Let time pass: it is what is measured. Returns how much did."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        time.sleep(0.05)
    return passed
