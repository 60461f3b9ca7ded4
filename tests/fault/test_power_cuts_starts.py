"""The power goes at any call while guests are started, frozen and put back.

What ran is lost with the host, says so, and names what it can be forked from; its own disk, which
its syncs reached, is there by name. `make test` opens a sample of the states, `make soak` each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diapause.guest.images import Image
from diapause.model import RestoreAnswer, RunAnswer, RunRequest
from tests.framework.cuts import (
    Numbered,
    check_cuts,
    lost_but_named,
    overlays_are_there,
    sample,
)
from tests.framework.fake_home import eventually
from tests.framework.power import Act, Opened, Recording, recording
from tests.framework.sandbox import (
    DISK_BYTES,
    MEMORY_BYTES,
    WAIT_S,
    Daemon,
    Sandbox,
    real_home,
)

pytestmark = pytest.mark.vm

Pick = Callable[[Recording], list[Numbered]]


def every(made: Recording) -> list[Numbered]:
    return list(made.states())


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def base(daemon: Daemon) -> str:
    """A packed snapshot, and no guest."""
    guest = daemon.run()
    guest.rewrite(64)
    made = guest.save("disk").snapshot
    daemon.packed(made)
    guest.remove()
    return made


def _settled(found: Opened, sandbox: str, told: bool) -> None:
    """Once it was said to run it is known, lost, with its disk; before, it may be nowhere."""
    row = found.sandboxes.get(sandbox)
    assert row is not None or not told
    if row is not None:
        lost_but_named(found, row)
        overlays_are_there(found, row)


def _starts(daemon: Daemon, base: str, pick: Pick) -> None:
    """A fork; a resume, a freeze and a thaw of one that is paused durably."""
    [guest] = daemon.fork(base)
    guest.rewrite(64)
    paused = guest.pause("disk").snapshot
    daemon.packed(paused)
    acts: list[Act] = [
        (partial(daemon.fork, base), lambda made: f'"sandboxes":["{made[0].id}"]'.encode()),
        (guest.resume, lambda _: f'"sandbox":"{guest.id}","warm":true'.encode()),
        (guest.freeze, lambda _: f'"sandbox":"{guest.id}","frozen":true'.encode()),
        (guest.thaw, lambda _: f'"sandbox":"{guest.id}","frozen":false'.encode()),
    ]
    with recording(daemon, *acts) as made:
        [[fork], *_] = made.answers

        def holds(made: Recording, found: Opened, promised: int) -> None:
            assert found.snapshots[base].state == found.snapshots[paused].state == "packed"
            _settled(found, fork.id, promised >= 1)
            row = found.sandboxes[guest.id]
            if promised < 2 and row.state == "paused":
                assert row.snapshot == paused
            else:
                _settled(found, guest.id, told=True)

        check_cuts(made, pick(made), holds)
    for one in (fork, guest):
        one.remove()


def _restore(daemon: Daemon, base: str, pick: Pick) -> None:
    """What it was is saved first, and it is that, or what it was put back to."""
    [guest] = daemon.fork(base)
    guest.rewrite(64)
    act: Act = partial(guest.restore, base), lambda _: f'"snapshot":"{base}","saved"'.encode()
    with recording(daemon, act, after=lambda: daemon.packed(_saved(daemon, guest))) as made:
        answer: RestoreAnswer = made.answer
        assert answer.saved is not None
        saved = answer.saved

        def holds(made: Recording, found: Opened, promised: int) -> None:
            assert found.snapshots[base].state == "packed"
            row = found.sandboxes[guest.id]
            if row.state == "paused":
                assert not promised
                assert row.snapshot in (base, saved)
                assert found.snapshots[row.snapshot].state == "packed"
            else:
                assert lost_but_named(found, row) in (base, saved)
            if promised:
                assert found.snapshots[saved].state == "packed"
                overlays_are_there(found, row)

        check_cuts(made, pick(made), holds)
    guest.remove()


def _saved(daemon: Daemon, guest: Sandbox) -> str:
    """The newest snapshot of this guest's."""
    rows = [row for row in daemon.client.snapshots() if row.sandbox == guest.id]
    return max(rows, key=lambda row: row.created_at).id


def _named(sandbox: str) -> bytes:
    return f'"sandbox":"{sandbox}"'.encode()


def _run(daemon: Daemon, base: str, pick: Pick) -> None:
    """Booted, with a ready snapshot kept behind it."""
    # Asked plainly: whatever else writes to the catalog meanwhile is not in the recording.
    request = RunRequest(memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES)
    ran: Act = partial(daemon.client.run, request), lambda made: _named(made.sandbox)
    none_waits = "diapause_pack_queue 0.0"

    def packed() -> None:
        eventually("the pack's end", lambda: none_waits in daemon.client.metrics(), WAIT_S)

    with recording(daemon, ran, after=packed) as made:
        answer: RunAnswer = made.answer
        assert not answer.warm

        def holds(made: Recording, found: Opened, promised: int) -> None:
            assert found.snapshots[base].state == "packed"
            row = found.sandboxes.get(answer.sandbox)
            assert row is not None or not promised
            if row is not None:
                assert row.state == "failed"
                assert row.error is not None
                assert row.error["code"] == "guest_lost"
                overlays_are_there(found, row)

        check_cuts(made, pick(made), holds)
    Sandbox(daemon, answer.sandbox).remove()


_VERBS = [_starts, _restore, _run]


@pytest.mark.parametrize("verb", [_starts, _restore])
def test_what_a_cut_leaves(
    daemon: Daemon, base: str, verb: Callable[[Daemon, str, Pick], None]
) -> None:
    verb(daemon, base, partial(sample, spread=4, last=1))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", _VERBS)
def test_every_state(daemon: Daemon, base: str, verb: Callable[[Daemon, str, Pick], None]) -> None:
    verb(daemon, base, every)
