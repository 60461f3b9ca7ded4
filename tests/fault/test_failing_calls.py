"""One call of a verb fails, once: the verb succeeds or says why, and nothing is lost.

`strace` injects the error into the real daemon at an exact call. Each verb is run for a sample of
its calls under `make test`, and for every one of them under `make soak`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diapause.guest.images import Image
from tests.framework.failing import Pick, faults, some, tried
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home
from tests.framework.strace import recorded


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def saved(daemon: Daemon) -> Sandbox:
    """A guest with one packed snapshot."""
    guest = daemon.run()
    guest.rewrite()
    daemon.packed(guest.save("disk").snapshot)
    return guest


def _pause_and_resume(daemon: Daemon, saved: Sandbox, pick: Pick) -> None:
    with saved.forked() as guest:
        guest.rewrite()
        with recorded(daemon.pid) as calls:
            guest.pause("disk")
        guest.resume()
        for fault in pick(faults(calls)):
            written = guest.rewrite()
            tried(daemon, fault, partial(guest.pause, "disk"))
            eventually(f"an end of {fault}", lambda: guest.state in ("running", "paused"), WAIT_S)
            if guest.state == "paused":
                guest.resume()
            assert guest.digests() == written, fault
            guest.pause("disk")
            guest.resume()
            assert guest.digests() == written, fault


def _save(daemon: Daemon, saved: Sandbox, pick: Pick) -> None:
    with saved.forked() as guest:
        guest.rewrite()
        with recorded(daemon.pid) as calls:
            daemon.packed(guest.save("disk").snapshot)
        for fault in pick(faults(calls)):
            written = guest.rewrite()
            tried(daemon, fault, partial(guest.save, "disk"))
            assert guest.state == "running", fault
            snapshot = guest.save("disk").snapshot
            with guest.forked(snapshot) as fork:
                assert fork.digests() == written, fault
            assert guest.digests() == written, fault


def _start(daemon: Daemon, saved: Sandbox, pick: Pick) -> None:
    with saved.forked() as guest:
        written = guest.rewrite()
        guest.pause("disk")
        with recorded(daemon.pid) as calls:
            guest.resume()
        guest.pause("disk")
        for fault in pick(faults(calls)):
            tried(daemon, fault, guest.resume)
            if guest.state != "running":
                assert guest.state == "paused", fault
                guest.resume()
            assert guest.digests() == written, fault
            guest.pause("disk")


_VERBS = [_pause_and_resume, _save, _start]


@pytest.mark.parametrize("verb", _VERBS)
def test_a_failing_call(
    daemon: Daemon, saved: Sandbox, verb: Callable[[Daemon, Sandbox, Pick], None]
) -> None:
    """Something of each kind of call."""
    verb(daemon, saved, some)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", _VERBS)
def test_every_failing_call(
    daemon: Daemon, saved: Sandbox, verb: Callable[[Daemon, Sandbox, Pick], None]
) -> None:
    verb(daemon, saved, list)
