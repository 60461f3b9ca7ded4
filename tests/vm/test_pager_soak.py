"""Pager and keeper killed at random moments under four guests that read what they own (soak)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest

from diapause.errors import DiapauseError
from diapause.model import ResumeRequest
from diapause.pager.client import Pager
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Aside, Daemon, Sandbox

pytestmark = [pytest.mark.vm, pytest.mark.soak]

GUESTS, KIB = 4, 16 * 1024
ONDEMAND = ResumeRequest(memory_mode="ondemand")


@pytest.fixture
def guests(daemon: Daemon, guest: Sandbox) -> Iterator[dict[Sandbox, str]]:
    """Four guests, and the digests of what each holds in memory and on its disk."""
    forks = guest.fork(GUESTS)
    try:
        yield {fork: fork.rewrite(KIB) for fork in forks}
    finally:
        for fork in forks:
            fork.remove()


@pytest.fixture
def pager(daemon: Daemon) -> Iterator[Pager]:
    with contextlib.closing(Pager(daemon.home)) as pager:
        yield pager


@pytest.mark.parametrize(("who", "kills"), [("pager", 50), ("keeper", 10)])
def test_one_of_the_two(
    daemon: Daemon, guests: dict[Sandbox, str], pager: Pager, who: str, kills: int
) -> None:
    """No guest notices more than a pause: each byte is right, each guest runs."""
    chance, done = random.Random(f"{who} {kills}"), 0
    while done < kills:
        _again(daemon, guests)
        reads = [Aside(guest.digests) for guest in guests]
        for _ in range(5):
            time.sleep(chance.uniform(0, 0.3))
            pair = pager.pair(start=False)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pair.pid if who == "pager" else pair.keeper_pid, signal.SIGKILL)
            done += 1
        assert [read.result() for read in reads] == list(guests.values())
        assert {guest.state for guest in guests} == {"running"}


def test_both(daemon: Daemon, guests: dict[Sandbox, str], pager: Pager) -> None:
    """Every guest ends and says why; what it was paused as can be started again."""
    chance = random.Random("both")
    held = dict(guests)
    for _ in range(10):
        snapshots = _again(daemon, held)
        reads = [Aside(guest.digests) for guest in held]
        time.sleep(chance.uniform(0, 0.5))
        pair = pager.pair(start=False)
        for signal_ in (signal.SIGSTOP, signal.SIGKILL):  # neither starts the other meanwhile
            for pid in (pair.pid, pair.keeper_pid):
                os.kill(pid, signal_)
        for guest in held:
            eventually("its end", partial(_has_failed, guest), WAIT_S)
            assert "keeper" in (guest.inspect().reason or "")
        for read, digests in zip(reads, held.values(), strict=True):
            assert _said(read) in (None, digests)
        restarted = {}
        for (guest, digests), snapshot in zip(held.items(), snapshots, strict=True):
            [fork] = daemon.fork(snapshot)
            guest.remove()
            restarted[fork] = digests
            assert fork.digests() == digests
        held = restarted
    for guest in held:
        guest.remove()


def _again(daemon: Daemon, guests: dict[Sandbox, str]) -> list[str]:
    """Each guest paused and resumed, so that nothing of it is in the page cache."""
    snapshots = []
    for guest in guests:
        snapshots.append(guest.pause("process").snapshot)
        answer = daemon.client.resume(guest.id, ONDEMAND)
        assert answer.memory_mode == "ondemand", answer.notes
    return snapshots


def _has_failed(guest: Sandbox) -> bool:
    return guest.state == "failed"


def _said(read: Aside) -> str | None:
    """What a guest read; None where it ended meanwhile."""
    try:
        return str(read.result())
    except (DiapauseError, AssertionError):
        return None
