"""The daemon killed: inside a commit, at a verb's end, at random moments, beside running guests.

Every step of every verb is in `test_kills_of_*.py`.

Whatever the moment, the guest or its snapshot is whole afterwards, nothing runs that no row names,
and the next save of that guest is exact: files that were rewritten just before are the same in a
fork, in memory and on the disk.
"""

from __future__ import annotations

import os
import random
import time
from functools import partial

import pytest

from diapause.errors import DaemonUnreachable
from tests.framework.catalog_tap import Place, at_end, at_snapshot
from tests.framework.fake_home import eventually
from tests.framework.kills import kill_at
from tests.framework.sandbox import WAIT_S, Aside, Daemon, Sandbox

pytestmark = pytest.mark.vm

SEED = int(os.environ.get("DIAPAUSE_SEED") or random.SystemRandom().randrange(1 << 32))
LONGEST_S = 0.25

SAVE_PLACES = [at_snapshot(), at_end("save")]
PAUSE_PLACES = [at_snapshot(), at_end("pause")]
RESUME_PLACES = [at_end("resume")]


def _name(place: Place) -> str:
    return place.name.replace(" ", "-")


@pytest.fixture
def counting(guest: Sandbox) -> Sandbox:
    """A guest that counts, and was saved before: its next capture is a tracked one."""
    guest.start_counter()
    guest.rewrite()
    guest.save()
    return guest


def check_whole(daemon: Daemon, guest: Sandbox, value: int, digests: str) -> None:
    """After a kill: settled, nothing of nobody runs, the guest goes on, the next save is exact."""
    state = guest.state
    assert state in ("running", "paused")
    assert guest.inspect().error is None
    check_processes(daemon)
    if state == "paused":
        guest.resume()
    guest.counts_beyond(value)
    saved = guest.save()
    with guest.forked(saved.snapshot) as fork:
        assert fork.digests() == digests
        fork.counts_beyond(value)
    assert not list(daemon.home.tmp.iterdir()) or state


def check_processes(daemon: Daemon) -> None:
    """Every VMM that runs is one that a running sandbox's row names."""
    rows = [daemon.client.inspect(row.sandbox) for row in daemon.client.sandboxes(everything=True)]
    named = {row.vmm.pid for row in rows if row.vmm is not None}
    eventually("the end of what nobody owns", lambda: set(daemon.vmms()) == named)


@pytest.mark.parametrize("place", SAVE_PLACES, ids=_name)
def test_killed_in_a_save(daemon: Daemon, counting: Sandbox, place: Place) -> None:
    """Inside the commit, and where its operation is closed."""
    value, digests = counting.counted(), counting.rewrite()
    kill_at(daemon, place, lambda: counting.save("disk"))
    check_whole(daemon, counting, value, digests)


@pytest.mark.parametrize("place", PAUSE_PLACES, ids=_name)
def test_killed_in_a_pause(daemon: Daemon, counting: Sandbox, place: Place) -> None:
    """The guest goes on, or is paused and can be resumed: decided by the commit."""
    value, digests = counting.counted(), counting.rewrite()
    kill_at(daemon, place, lambda: counting.pause("disk"))
    done = place == at_end("pause")
    assert counting.state == ("paused" if done else "running")
    check_whole(daemon, counting, value, digests)


@pytest.mark.parametrize("place", RESUME_PLACES, ids=_name)
def test_killed_in_a_resume(daemon: Daemon, counting: Sandbox, place: Place) -> None:
    """The VMM of a resume that was not done is ended, and the sandbox is paused as before."""
    value, digests = counting.counted(), counting.rewrite()
    counting.pause()
    kill_at(daemon, place, counting.resume)
    assert counting.state == ("running" if place == at_end("resume") else "paused")
    check_whole(daemon, counting, value, digests)


def killed_at_random(daemon: Daemon, guest: Sandbox, rounds: int) -> None:
    """Saves and pauses, each with a kill after a random time."""
    print(f"seed {SEED}: DIAPAUSE_SEED={SEED} does the same again")
    chance = random.Random(SEED)
    for number in range(rounds):
        value, digests = guest.counted(), guest.rewrite()
        verb = guest.save if number % 2 else guest.pause
        durability = chance.choice(("process", "disk"))
        delay_s = chance.uniform(0, LONGEST_S)
        print(f"round {number}: {verb.__name__} to {durability}, killed after {delay_s:.3f} s")
        call = Aside(partial(verb, durability))
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline:
            time.sleep(0.001)
        daemon.kill()
        assert call.wait() is None or isinstance(call.failure, DaemonUnreachable)
        check_whole(daemon, guest, value, digests)


def test_killed_at_random_moments(daemon: Daemon, counting: Sandbox) -> None:
    """A few rounds; many are under `soak`."""
    killed_at_random(daemon, counting, 8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_many_times(daemon: Daemon, counting: Sandbox) -> None:
    """A hundred rounds."""
    killed_at_random(daemon, counting, 100)


def test_guests_outlive_the_daemon(daemon: Daemon, counting: Sandbox) -> None:
    """Two guests go on while there is no daemon, and the next one takes them up."""
    with counting.forked() as other:
        pids = {counting.vmm_pid, other.vmm_pid}
        values = [guest.counted() for guest in (counting, other)]
        digests = [guest.rewrite() for guest in (counting, other)]
        daemon.kill()
        assert pids <= set(daemon.vmms())
        for guest, value, digest in zip((counting, other), values, digests, strict=True):
            assert guest.state == "running"
            guest.counts_beyond(value)
            check_whole(daemon, guest, value, digest)
        assert {counting.vmm_pid, other.vmm_pid} == pids


def test_a_daemon_that_is_stopped_in_order_leaves_its_guests(
    daemon: Daemon, counting: Sandbox
) -> None:
    """SIGTERM is no kinder to the daemon than to the guests."""
    value, pid = counting.counted(), counting.vmm_pid
    digests = counting.digests()
    daemon.stop()
    assert pid in daemon.vmms()
    check_whole(daemon, counting, value, digests)
    assert counting.vmm_pid == pid


def test_the_file_below_a_running_guest_may_be_made_anew(daemon: Daemon, counting: Sandbox) -> None:
    """A guest whose flat file was replaced under it is taken up all the same."""
    counting.pause()
    assert counting.resume(memory_mode="copy").memory_mode == "copy"
    value, digests = counting.counted(), counting.rewrite()
    root = daemon.record(counting.id).root
    assert root is not None
    flat = daemon.home.flat_of(root) / "memory"
    flat.touch()
    before = flat.stat().st_ino
    daemon.make_flat_files(root)
    assert flat.stat().st_ino != before
    daemon.kill()
    check_whole(daemon, counting, value, digests)


def test_a_vmm_killed_while_there_is_no_daemon(daemon: Daemon, guest: Sandbox) -> None:
    """The next daemon finds it gone: failed, with its cause."""
    pid = guest.vmm_pid
    daemon.kill()
    os.kill(pid, 9)
    eventually("the end of the VMM", lambda: pid not in daemon.vmms(), WAIT_S)
    found = guest.inspect()
    assert (found.state, found.vmm) == ("failed", None)
    assert found.error is not None
    assert "has ended" in found.error["message"]
