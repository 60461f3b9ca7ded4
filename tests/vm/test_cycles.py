"""Pause and resume, again and again: nothing lost, nothing twice, nothing left behind."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from tests.framework.clock import clock_error_s, uptime_s
from tests.framework.guest_exec import Follower
from tests.framework.sandbox import Aside, Daemon, Sandbox

pytestmark = pytest.mark.vm

CYCLES = 10
COUNT_ALOUD = "i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"


def test_ten_cycles_lose_and_repeat_nothing(daemon: Daemon, guest: Sandbox) -> None:
    """A counter, a file in memory, a file on the disk and an open exec, through ten pauses."""
    guest.start_counter()
    digests = guest.rewrite()
    followed = Follower(guest.stream("sh", "-c", COUNT_ALOUD))
    others = set(daemon.vmms()) - {guest.vmm_pid}
    for cycle in range(CYCLES):
        before = guest.counted()
        durability = "disk" if cycle % 3 == 0 else "process"
        paused = guest.pause(durability)
        assert not paused.already
        assert guest.inspect().vmm is None
        assert set(daemon.vmms()) == others, "a VMM outlived its pause"
        daemon.packed(paused.snapshot)
        assert _held_on_tmpfs(daemon, guest) == []
        resumed = guest.resume()
        assert resumed.warm
        assert resumed.notes == []
        guest.counts_beyond(before)
    assert guest.digests() == digests
    followed.close()
    assert followed.failure is None or followed.stream.exit is None
    values = [int(line) for line in followed.lines]
    assert values == list(range(1, len(values) + 1))
    assert len(values) > CYCLES


def _held_on_tmpfs(daemon: Daemon, guest: Sandbox) -> list[str]:
    """Files in the home's buffers; captures of others may be on their way."""
    deadline = time.monotonic() + 20
    while (
        left := [path.name for path in daemon.home.buffers.iterdir()]
    ) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def test_the_clock_is_right_and_no_time_passed_for_the_guest(guest: Sandbox) -> None:
    """CLOCK_REALTIME within 100 ms; CLOCK_MONOTONIC does not contain the pause."""
    errors = []
    for _ in range(2):
        began, monotonic = time.monotonic(), uptime_s(guest)
        guest.pause()
        slept = time.monotonic()
        # The pause has to be long enough to be seen in the guest's clock if it were.
        while time.monotonic() < slept + 2:
            time.sleep(0.05)
        asleep = time.monotonic() - slept
        guest.resume()
        errors.append(clock_error_s(guest))
        passed = uptime_s(guest) - monotonic
        awake = time.monotonic() - began - asleep
        assert 0 <= passed <= awake + 0.05, f"{passed:.2f} s passed in {awake:.2f} s awake"
    assert max(map(abs, errors)) <= 0.1, errors


def test_a_pause_of_a_paused_and_a_resume_of_a_running_one(guest: Sandbox) -> None:
    """Success that says so, and nothing done twice."""
    first = guest.pause()
    again = guest.pause()
    assert again.already
    assert (again.snapshot, again.captured_bytes) == (first.snapshot, 0)
    assert not guest.resume().already
    pid = guest.vmm_pid
    assert guest.resume().already
    assert guest.vmm_pid == pid


def test_four_are_paused_and_resumed_at_once(booted: Sandbox) -> None:
    """Each with its own counter, and none is in another's way."""
    forks = booted.fork(4)
    try:
        for fork in forks:
            fork.start_counter()
            fork.rewrite()
        digests = [fork.digests() for fork in forks]
        for _ in range(2):
            before = [fork.counted() for fork in forks]
            for verb in (Sandbox.pause, Sandbox.resume):
                calls = [Aside(partial(verb, fork)) for fork in forks]
                for call in calls:
                    call.result()
            for fork, value in zip(forks, before, strict=True):
                fork.counts_beyond(value)
        assert [fork.digests() for fork in forks] == digests
    finally:
        for fork in forks:
            fork.remove()


def test_two_clients_on_one_sandbox(daemon: Daemon, guest: Sandbox) -> None:
    """Both pause: one does it, the other finds it done; the same for resume."""
    guest.start_counter()
    for _ in range(3):
        before = guest.counted()
        pauses = [Aside(guest.pause) for _ in range(2)]
        answers = [call.result() for call in pauses]
        assert sorted(answer.already for answer in answers) == [False, True]
        assert len({answer.snapshot for answer in answers}) == 1
        resumes = [Aside(guest.resume) for _ in range(2)]
        assert sorted(call.result().already for call in resumes) == [False, True]
        guest.counts_beyond(before)
    assert guest.vmm_pid in daemon.vmms()


def test_memory_comes_back_to_the_host(daemon: Daemon, guest: Sandbox) -> None:
    """A paused sandbox has no process, and its memory is in no file of the tmpfs."""
    guest.sh("head -c 40000000 /dev/urandom >/tmp/large")
    pid = guest.vmm_pid
    paused = guest.pause("disk")
    assert not Path(f"/proc/{pid}").exists() or pid not in daemon.vmms()
    assert not (daemon.home.buffers / f"{paused.snapshot}.memory").exists()
    assert not list(daemon.home.sandbox(guest.id).glob("*.qcow2"))
    assert not list(daemon.home.sockets.glob(f"{guest.id}.*"))
