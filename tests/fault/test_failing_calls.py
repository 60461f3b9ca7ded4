"""One call of a verb fails, once: the verb succeeds or says why, and nothing is lost.

`strace` injects the error into the real daemon at an exact call. Each verb is run for a sample of
its calls under `make test`, and for every one of them under `make soak`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diapause.errors import DiapauseError
from diapause.guest.images import Image
from tests.framework.fake_home import eventually
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home
from tests.framework.strace import Call, failing, recorded

# A call, and the errors that a file system answers it with.
ERRORS = {
    "openat": ("ENOSPC", "EIO", "EMFILE", "EINTR"),
    "write": ("ENOSPC", "EIO", "EINTR"),
    "pwrite64": ("ENOSPC", "EIO", "EINTR"),
    "ftruncate": ("ENOSPC", "EIO"),
    "fallocate": ("ENOSPC",),
    "fsync": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "rename": ("ENOSPC", "EIO"),
    "link": ("ENOSPC", "EMLINK"),
    "linkat": ("ENOSPC", "EMLINK"),
    "mkdir": ("ENOSPC", "EIO"),
    "unlink": ("EIO",),
}
_SAMPLE = 12
Fault = tuple[str, str, int]


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


def _faults(calls: list[Call]) -> list[Fault]:
    """Every error at every call of a verb as it goes when nothing fails."""
    made = Counter(call.name for call in calls if call.name in ERRORS)
    return [
        (name, error, when)
        for name, times in sorted(made.items())
        for error in ERRORS[name]
        for when in range(1, times + 1)
    ]


def _sample(faults: list[Fault]) -> list[Fault]:
    assert len(faults) > 4 * _SAMPLE, "too few calls for a verb that writes"
    return faults[:: len(faults) // _SAMPLE]


def _tried(daemon: Daemon, fault: Fault, act: Callable[[], object]) -> None:
    """Do it while one call fails; what came of it has a name."""
    name, error, when = fault
    refused: DiapauseError | None = None
    with failing(daemon.pid, name, error, when):
        try:
            act()
        except DiapauseError as found:
            refused = found
    if refused is not None:
        assert refused.code != DiapauseError.code, (fault, refused.message)


def _pause_and_resume(daemon: Daemon, saved: Sandbox, pick: Pick) -> None:
    with saved.forked() as guest:
        guest.rewrite()
        with recorded(daemon.pid) as calls:
            guest.pause("disk")
        guest.resume()
        for fault in pick(_faults(calls)):
            written = guest.rewrite()
            _tried(daemon, fault, partial(guest.pause, "disk"))
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
        for fault in pick(_faults(calls)):
            written = guest.rewrite()
            _tried(daemon, fault, partial(guest.save, "disk"))
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
        for fault in pick(_faults(calls)):
            _tried(daemon, fault, guest.resume)
            if guest.state != "running":
                assert guest.state == "paused", fault
                guest.resume()
            assert guest.digests() == written, fault
            guest.pause("disk")


Pick = Callable[[list[Fault]], list[Fault]]
_VERBS = [_pause_and_resume, _save, _start]


@pytest.mark.parametrize("verb", _VERBS)
def test_a_failing_call(
    daemon: Daemon, saved: Sandbox, verb: Callable[[Daemon, Sandbox, Pick], None]
) -> None:
    """Something of each kind of call."""
    verb(daemon, saved, _sample)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", _VERBS)
def test_every_failing_call(
    daemon: Daemon, saved: Sandbox, verb: Callable[[Daemon, Sandbox, Pick], None]
) -> None:
    verb(daemon, saved, list)
