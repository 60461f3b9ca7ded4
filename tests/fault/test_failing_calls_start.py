"""One call below the home fails, once, while a daemon starts: nothing is lost by it.

The catalog is opened, a guest is taken up, what was half-written goes. A daemon that can't says why
and ends, or serves; the next one finds everything. `make test` fails a sample of the calls, `make
soak` every one.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from diapause.errors import DiapauseError
from diapause.guest.images import Image
from diapause.store.home import Home
from tests.framework.failing import ERRORS, Fault, Pick, some
from tests.framework.fake_home import eventually, gone
from tests.framework.leftovers import nothing_left
from tests.framework.sandbox import WAIT_S, Daemon, real_home

pytestmark = pytest.mark.vm


class Place:
    """A home with a guest that runs and one that is paused, and no daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.home = daemon, daemon.home
        self.guest, self.paused = daemon.run(), daemon.run()
        self.written = self.guest.rewrite(64)
        daemon.packed(self.paused.pause("disk").snapshot)
        self.states = {self.guest.id: "running", self.paused.id: "paused"}
        self.end()

    def end(self) -> None:
        """The daemon, if one is there, ends as nobody expects; something is half-written."""
        pid = int(self.home.serve_lock.read_text() or 0)
        if pid and not gone(pid):
            os.kill(pid, signal.SIGKILL)
            eventually("the end of the daemon", lambda: gone(pid), WAIT_S)
        (self.home.tmp / "half-written").mkdir(exist_ok=True)
        (self.home.tmp / "half-written" / "file").write_bytes(b"half")
        (self.home.captures / "nobodys").mkdir(exist_ok=True)

    def started(self, log: Path, *more: str) -> DiapauseError | None:
        """Start a daemon under strace, ask it something, and end it; what it refused with."""
        traced = ("strace", "-f", "-y", "-s", "4096", "-o", str(log), *more)
        daemon = Daemon(self.home, within=traced)
        refused = None
        try:
            daemon.client.sandboxes(everything=True)
        except DiapauseError as error:
            refused = error
        self.end()
        return refused

    def whole(self, fault: Fault) -> None:
        """Everything is there under the next daemon."""
        rows = self.daemon.client.sandboxes(everything=True)
        assert {row.sandbox: row.state for row in rows} == self.states, fault
        nothing_left(self.home)
        self.end()


@pytest.fixture(scope="module")
def place(tiny_image: Image) -> Iterator[Place]:
    with real_home(tiny_image) as made:
        yield Place(made)


def _faults(log: Path, home: Home) -> list[Fault]:
    """Every error at every call on something below the home; times are counted by thread."""
    times: Counter[tuple[bytes, bytes]] = Counter()
    found: dict[Fault, None] = {}
    for line in log.read_bytes().splitlines():
        thread, _, text = line.partition(b" ")
        name, begins, _ = text.strip().partition(b"(")
        if not begins or name.startswith(b"<"):
            continue
        times[thread, name] += 1
        if str(home.root).encode() in text:
            call = name.decode()
            found |= dict.fromkeys(
                (call, error, times[thread, name]) for error in ERRORS.get(call, ())
            )
    return sorted(found)


def _each(place: Place, tmp_path: Path, pick: Pick) -> None:
    log = tmp_path / "calls"
    assert place.started(log, "-e", f"trace={','.join(ERRORS)}") is None
    for fault in pick(_faults(log, place.home)):
        name, error, when = fault
        inject = f"inject={name}:error={error}:when={when}"
        refused = place.started(log, "-e", f"trace={name}", "-e", inject)
        if refused is not None:
            assert refused.code != DiapauseError.code, (fault, refused.message)
        place.whole(fault)
    place.daemon.client.sandboxes()
    assert place.guest.digests() == place.written
    place.paused.resume()
    place.paused.pause("disk")
    place.end()


def test_a_failing_call(place: Place, tmp_path: Path) -> None:
    """Something of each kind of call."""
    _each(place, tmp_path, partial(some, size=8))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_failing_call(place: Place, tmp_path: Path) -> None:
    _each(place, tmp_path, list)
