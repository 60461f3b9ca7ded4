"""What a fork has of its own: entropy, identity, name; and what it shares: the rest, as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.framework.sandbox import Sandbox

pytestmark = pytest.mark.vm

UNIQUE: dict[str, str] = {
    "random bytes": "head -c 32 /dev/urandom | od -An -tx1",
    "uuid": "cat /proc/sys/kernel/random/uuid",
    "machine id": "cat /etc/machine-id",
    "hostname": "hostname",
}


@pytest.fixture(scope="module")
def forks(booted: Sandbox) -> list[Sandbox]:
    """Two of one snapshot, of a guest that has used its random pool."""
    booted.sh("head -c 100000 /dev/urandom >/tmp/random; echo shared >/tmp/mark")
    return booted.fork(2)


@pytest.mark.parametrize("what", UNIQUE)
def test_each_has_its_own(booted: Sandbox, forks: list[Sandbox], what: str) -> None:
    """Two forks and their origin differ."""
    found = [guest.sh(UNIQUE[what]).strip() for guest in (booted, *forks)]
    assert all(found)
    assert len(set(found)) == len(found), found


def test_a_running_shell_sees_its_new_name(forks: list[Sandbox]) -> None:
    """The kernel's name, the file and what inspect says are one."""
    for fork in forks:
        name = fork.inspect().hostname
        assert fork.sh("cat /etc/hostname /proc/sys/kernel/hostname").split() == [name, name]


def test_what_was_there_is_there(booted: Sandbox, forks: list[Sandbox]) -> None:
    """The same bytes in each; what one writes, nobody else sees."""
    read: Callable[[Sandbox], str] = lambda guest: guest.sh("sha256sum /tmp/random")  # noqa: E731
    assert len({read(guest) for guest in (booted, *forks)}) == 1
    forks[0].sh("echo mine >/tmp/mark; echo mine >/data/mark; sync")
    assert forks[1].sh("cat /tmp/mark; ls /data").split() == ["shared", "lost+found"]
    assert booted.sh("cat /tmp/mark").strip() == "shared"


def test_a_resumed_guest_draws_fresh_random_bytes(booted: Sandbox) -> None:
    """The same snapshot, forked twice one after the other."""
    saved = booted.save()
    drawn = []
    for _ in range(2):
        with booted.forked(saved.snapshot) as fork:
            drawn.append(fork.sh(UNIQUE["random bytes"]))
    assert drawn[0] != drawn[1]
