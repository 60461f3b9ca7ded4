"""One call of a verb fails, once: the verb succeeds or says why, and nothing is lost.

`strace` injects the error into the real daemon at an exact call. Each verb is run for a sample of
its calls under `make test`, and for every one of them under `make soak`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diapause.guest.images import Image
from diapause.model import GcRequest
from tests.framework.failing import Fault, Pick, faults, some, tried
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home
from tests.framework.strace import recorded

_FAULTS_OF_A_GUEST = 16


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def base(daemon: Daemon) -> str:
    """A packed snapshot, and no guest."""
    guest = daemon.run()
    guest.rewrite()
    made = guest.save("disk").snapshot
    daemon.packed(made)
    guest.remove()
    return made


def _each(daemon: Daemon, base: str, found: list[Fault]) -> Iterator[tuple[Sandbox, Fault]]:
    """A running guest for each fault; a new one after a few, since every save lengthens the chain
    of overlays that its disk is read through."""
    for first in range(0, len(found), _FAULTS_OF_A_GUEST):
        with Sandbox(daemon, "").forked(base) as guest:
            for fault in found[first : first + _FAULTS_OF_A_GUEST]:
                yield guest, fault
        for row in daemon.client.snapshots():
            if row.id != base:
                daemon.client.remove_snapshot(row.id)
        daemon.client.gc(GcRequest())


def _stands_or_runs(guest: Sandbox) -> bool:
    return guest.state in ("running", "paused")


def _pause_and_resume(daemon: Daemon, base: str, pick: Pick) -> None:
    with Sandbox(daemon, "").forked(base) as guest:
        guest.rewrite()
        with recorded(daemon.pid) as calls:
            guest.pause("disk")
    for guest, fault in _each(daemon, base, pick(faults(calls))):
        written = guest.rewrite()
        tried(daemon, fault, partial(guest.pause, "disk"))
        eventually(f"an end of {fault}", partial(_stands_or_runs, guest), WAIT_S)
        if guest.state == "paused":
            guest.resume()
        assert guest.digests() == written, fault
        guest.pause("disk")
        guest.resume()
        assert guest.digests() == written, fault


def _save(daemon: Daemon, base: str, pick: Pick) -> None:
    with Sandbox(daemon, "").forked(base) as guest:
        guest.rewrite()
        with recorded(daemon.pid) as calls:
            daemon.packed(guest.save("disk").snapshot)
    for guest, fault in _each(daemon, base, pick(faults(calls))):
        written = guest.rewrite()
        tried(daemon, fault, partial(guest.save, "disk"))
        assert guest.state == "running", fault
        snapshot = guest.save("disk").snapshot
        with guest.forked(snapshot) as fork:
            assert fork.digests() == written, fault
        assert guest.digests() == written, fault


def _start(daemon: Daemon, base: str, pick: Pick) -> None:
    with Sandbox(daemon, "").forked(base) as guest:
        guest.rewrite()
        guest.pause("disk")
        with recorded(daemon.pid) as calls:
            guest.resume()
    for guest, fault in _each(daemon, base, pick(faults(calls))):
        written = guest.rewrite()
        guest.pause("disk")
        tried(daemon, fault, guest.resume)
        if guest.state != "running":
            assert guest.state == "paused", fault
            guest.resume()
        assert guest.digests() == written, fault


_VERBS = [_pause_and_resume, _save, _start]


@pytest.mark.parametrize("verb", _VERBS)
def test_a_failing_call(
    daemon: Daemon, base: str, verb: Callable[[Daemon, str, Pick], None]
) -> None:
    """Something of each kind of call."""
    verb(daemon, base, some)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", _VERBS)
def test_every_failing_call(
    daemon: Daemon, base: str, verb: Callable[[Daemon, str, Pick], None]
) -> None:
    verb(daemon, base, list)
