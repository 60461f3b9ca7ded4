"""A cgroup for each VMM, in the host's own cgroup2: from its first instruction to its end.

Whether there are limits in it is the host's affair: most that have version 1 beside it delegate no
controller. `test_cgroup_limits.py` has a kernel that does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from diapause.daemon.reset import reset
from diapause.driver.cgroup import CONTROLLERS, VARIABLE, lies_on_tmpfs
from diapause.guest.images import Image
from tests.framework.cgroups import cgroup_path, cgroup_place, leaves_in
from tests.framework.fake_home import eventually
from tests.framework.leftovers import leftovers, nothing_left
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """What the host delegates."""
    with cgroup_place() as made:
        yield made


@pytest.fixture(scope="module")
def daemon(tiny_image: Image, place: Path) -> Iterator[Daemon]:
    """A daemon that was told of it."""
    with real_home(tiny_image, **{VARIABLE: str(place)}) as made:
        yield made


def leaves_of(place: Path, sandbox: Sandbox) -> list[str]:
    """The leaves of one sandbox."""
    start = f"diapause-{sandbox.daemon.home.key}-{sandbox.id}."
    return [name for name in leaves_in(place) if name.startswith(start)]


def leaf_of(place: Path, sandbox: Sandbox) -> Path:
    """Its one leaf."""
    [name] = leaves_of(place, sandbox)
    return place / name


def test_each_vmm_has_a_cgroup_of_its_own(daemon: Daemon, guest: Sandbox, place: Path) -> None:
    """With all of its threads, and nothing else in it; the daemon stays where it was."""
    with guest.forked() as other:
        for sandbox in (guest, other):
            pid, leaf = sandbox.vmm_pid, leaf_of(place, sandbox)
            assert cgroup_path(pid).endswith(f"/{place.name}/{leaf.name}")
            assert (leaf / "cgroup.procs").read_text().split() == [str(pid)]
            threads = {entry.name for entry in Path(f"/proc/{pid}/task").iterdir()}
            assert len(threads) > 1
            assert {cgroup_path(int(thread)) for thread in threads} == {cgroup_path(pid)}
        assert leaf_of(place, guest) != leaf_of(place, other)
    assert cgroup_path(daemon.pid) == cgroup_path(os.getpid())


def test_a_boot_has_one_as_well(booted: Sandbox, place: Path) -> None:
    assert cgroup_path(booted.vmm_pid).endswith(f"/{leaf_of(place, booted).name}")


def test_inspect_and_doctor_say_what_the_kernel_holds(
    daemon: Daemon, guest: Sandbox, place: Path
) -> None:
    """The directory, and a limit for each controller that is there; what is not says why."""
    found, leaf = guest.inspect().confinement, leaf_of(place, guest)
    assert found is not None
    assert Path(found.cgroup).samefile(leaf)
    there = [
        name for name in CONTROLLERS if name in (place / "cgroup.controllers").read_text().split()
    ]
    in_memory = lies_on_tmpfs(daemon.home.root)  # there it has no sum that is known beforehand
    assert (found.memory_bytes_max is not None) == ("memory" in there and not in_memory)
    assert (found.tasks_max is not None) == ("pids" in there)
    [check] = [each for each in daemon.client.doctor().checks if each.name == "vmm cgroup"]
    assert check.ok == (len(there) == len(CONTROLLERS) and not in_memory)
    assert "one of its own" in check.detail
    if not check.ok:
        assert "controller" in check.detail or "tmpfs" in check.detail
        assert "Delegate=memory pids" in check.fix


def test_it_goes_with_the_vmm(guest: Sandbox, place: Path) -> None:
    """By a pause, by the guest's own end, by rm; each start has a new one."""
    first = leaf_of(place, guest)
    guest.pause()
    assert leaves_of(place, guest) == []
    guest.resume()
    assert leaf_of(place, guest) != first
    with guest.forked() as ends, guest.forked() as removed:
        ends.in_background("usleep 200000; poweroff -f")
        eventually("its end", lambda: ends.state == "stopped", WAIT_S)
        eventually("the end of its leaf", lambda: leaves_of(place, ends) == [], WAIT_S)
        removed.remove()
        assert leaves_of(place, removed) == []
    assert len(leaves_of(place, guest)) == 1


def test_a_guest_that_is_adopted_keeps_its_own_and_the_rest_is_swept(
    daemon: Daemon, guest: Sandbox, booted: Sandbox, place: Path
) -> None:
    """A leaf that a daemon made and died over goes; what is another home's or nobody's stays."""
    kept, of_booted = leaf_of(place, guest), leaf_of(place, booted)
    orphan = place / f"diapause-{daemon.home.key}-{'0' * 16}.00000000"
    others = [place / f"diapause-{'0' * 12}-{'0' * 16}.00000000", place / "somebody"]
    try:
        for path in (orphan, *others):
            path.mkdir()
        daemon.kill()
        assert f"cgroup {orphan.name}" in leftovers(daemon.home)
        assert guest.state == "running"  # asks a new daemon
        assert leaf_of(place, guest) == kept
        assert leaf_of(place, booted) == of_booted
        assert not orphan.exists()
        assert [path.exists() for path in others] == [True, True]
        guest.pause()  # by the daemon that adopted it
        assert leaves_of(place, guest) == []
    finally:
        for path in others:
            path.rmdir()


def test_what_died_with_the_daemon_leaves_none(daemon: Daemon, guest: Sandbox, place: Path) -> None:
    """Both killed: the next daemon fails the sandbox and removes its leaf."""
    pid = guest.vmm_pid
    daemon.kill()
    os.kill(pid, signal.SIGKILL)
    eventually("the sandbox's end", lambda: guest.state == "failed", WAIT_S)
    eventually("the end of its leaf", lambda: leaves_of(place, guest) == [], WAIT_S)
    nothing_left(daemon.home)


def test_a_daemon_that_was_told_of_none_ends_a_guest_that_has_one(
    tiny_image: Image, place: Path
) -> None:
    """Where a guest is is the kernel's to say, not the daemon's that adopted it."""
    with real_home(tiny_image, **{VARIABLE: str(place)}) as made:
        sandbox = made.run()
        leaf = leaf_of(place, sandbox)
        other = made.with_environment({})
        found = other.client.inspect(sandbox.id).confinement
        assert found is not None
        assert Path(found.cgroup).samefile(leaf)
        other.client.remove(sandbox.id, force=True)
        assert not leaf.exists()


def test_a_reset_removes_it(tiny_image: Image, place: Path) -> None:
    with real_home(tiny_image, **{VARIABLE: str(place)}) as made:
        leaf = leaf_of(place, made.run())
        reset(made.home)
        assert not leaf.exists()


@pytest.mark.parametrize("named", ["missing", "file"])
def test_a_name_that_is_no_cgroup_is_said(tiny_image: Image, tmp_path: Path, named: str) -> None:
    """Guests run all the same, without; doctor has the reason."""
    (tmp_path / "file").touch()
    with real_home(tiny_image, **{VARIABLE: str(tmp_path / named)}) as made:
        [check] = [each for each in made.client.doctor().checks if each.name == "vmm cgroup"]
        assert not check.ok
        assert check.detail.startswith(f"none: {VARIABLE} names {tmp_path / named}")
