"""Each verb cancelled in each of its steps: the sandbox is as before, and nothing is left over.

A cancel that comes while a step is under way is seen after it; the later steps are not taken. From
the step that can't be put back on, the verb is done in spite of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from diapause.errors import Cancelled, OperationNotFound
from diapause.guest.images import Image
from diapause.sandbox.pause import Pause, Save
from diapause.sandbox.restore import Restore
from diapause.sandbox.resume import Boot, Fork, Resume
from diapause.sandbox.verb import Verb
from tests.framework.fake_home import eventually
from tests.framework.gated import Gated
from tests.framework.sandbox import WAIT_S, Aside, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    """A home whose daemon has gates."""
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def gated(daemon: Daemon) -> Gated:
    return Gated(daemon)


@pytest.fixture(scope="module")
def guest(gated: Gated) -> Sandbox:
    """One guest for all of them: it counts, and its next capture is a tracked one."""
    made = gated.daemon.run(name="web")
    made.start_counter()
    gated.daemon.packed(made.save("disk").snapshot)
    return made


def cancellable(verb: type[Verb]) -> tuple[str, ...]:
    """The steps before the one from which it is sure."""
    return verb.steps[: verb.steps.index(verb.sure_from)]


def files(daemon: Daemon) -> set[str]:
    """What lies in the home and on its tmpfs, but for what a running guest writes anyway."""
    home = daemon.home
    places = [home.tmp, home.captures, home.buffers, home.sandboxes]
    found = {path for place in places for path in place.rglob("*")}
    return {str(path) for path in found if path.suffix not in (".log", ".unmerged", ".qcow2")}


def check_left(daemon: Daemon, before: set[str]) -> None:
    """Nothing but the mark of a save that re-armed; what is packed behind is written meanwhile."""

    def left() -> set[str]:
        return {path for path in files(daemon) - before if not path.endswith("capture.mark")}

    eventually("the end of what it wrote", lambda: not left(), WAIT_S)


def check_settled(daemon: Daemon, rows: int) -> None:
    """No process and no open operation beside those of the rows."""
    found = daemon.client.sandboxes(everything=True)
    assert len(found) == rows
    running = [row for row in found if row.state == "running"]
    eventually("the end of its VMM", lambda: len(daemon.vmms()) == len(running), WAIT_S)
    assert all(daemon.client.inspect(row.sandbox).doing is None for row in found)


@pytest.mark.parametrize("step", cancellable(Save))
def test_a_save_is_cancelled(gated: Gated, guest: Sandbox, step: str) -> None:
    """The guest goes on; what was re-armed away is in the next capture."""
    daemon = gated.daemon
    before, value, snapshots = files(daemon), guest.counted(), len(daemon.client.snapshots())
    digests = guest.rewrite()
    error = gated.cancelled_in("save", step, lambda: guest.save("disk"))
    assert isinstance(error, Cancelled), error
    assert guest.state == "running"
    assert len(daemon.client.snapshots()) == snapshots
    check_left(daemon, before)
    guest.counts_beyond(value)
    saved = guest.save()
    with guest.forked(saved.snapshot) as fork:
        assert fork.digests() == digests
    check_settled(daemon, 1)


@pytest.mark.parametrize("step", cancellable(Pause))
def test_a_pause_is_cancelled(gated: Gated, guest: Sandbox, step: str) -> None:
    """The guest goes on where it stood, though the frozen section ran to its end."""
    daemon = gated.daemon
    before, value, snapshots = files(daemon), guest.counted(), len(daemon.client.snapshots())
    error = gated.cancelled_in("pause", step, guest.pause)
    assert isinstance(error, Cancelled), error
    assert guest.state == "running"
    assert len(daemon.client.snapshots()) == snapshots
    check_left(daemon, before)
    guest.counts_beyond(value)
    check_settled(daemon, 1)


@pytest.mark.parametrize("step", cancellable(Fork))
def test_a_fork_is_cancelled(gated: Gated, guest: Sandbox, step: str) -> None:
    """There is no fork; the snapshot it came from stays."""
    daemon = gated.daemon
    parent = guest.inspect().parent
    assert parent is not None
    before = files(daemon)
    error = gated.cancelled_in("fork", step, lambda: daemon.fork(parent, 2))
    assert isinstance(error, Cancelled), error
    check_left(daemon, before)
    check_settled(daemon, 1)


@pytest.mark.parametrize("step", cancellable(Boot))
def test_a_run_is_cancelled(gated: Gated, guest: Sandbox, step: str) -> None:
    """There is no sandbox, and its name is free."""
    daemon = gated.daemon
    before = files(daemon)
    error = gated.cancelled_in("run", step, lambda: daemon.run(name="other"))
    assert isinstance(error, Cancelled), error
    check_left(daemon, before)
    check_settled(daemon, 1)


@pytest.mark.parametrize("step", cancellable(Resume))
def test_a_resume_is_cancelled(gated: Gated, guest: Sandbox, step: str) -> None:
    """It is paused as before, and resumes warm."""
    daemon, value = gated.daemon, guest.counted()
    guest.pause()
    error = gated.cancelled_in("resume", step, guest.resume)
    assert isinstance(error, Cancelled), error
    assert guest.state == "paused"
    check_settled(daemon, 1)
    assert guest.resume().warm
    guest.counts_beyond(value)


@pytest.mark.parametrize("step", cancellable(Restore))
def test_a_restore_is_cancelled(gated: Gated, guest: Sandbox, step: str) -> None:
    """It runs where it was: what was saved of it is taken up again."""
    daemon = gated.daemon
    then = guest.save().snapshot
    value, digests = guest.counted(), guest.rewrite()
    error = gated.cancelled_in("restore", step, lambda: guest.restore(then))
    assert isinstance(error, Cancelled), error
    assert guest.state == "running"
    assert guest.digests() == digests
    guest.counts_beyond(value)
    check_settled(daemon, 1)


def test_from_a_certain_step_on_it_is_done(gated: Gated, guest: Sandbox) -> None:
    """A cancel that comes too late changes nothing, and the operation says so."""
    assert gated.cancelled_in("pause", "commit", guest.pause) is None
    assert gated.daemon.client.operation(gated.operations[-1]).state == "done"
    assert guest.state == "paused"
    assert gated.cancelled_in("resume", "publish", guest.resume) is None
    assert guest.state == "running"


def test_whoever_waits_for_a_turn_is_cancelled(gated: Gated, guest: Sandbox) -> None:
    """At once, while the verb before goes on; it never began."""
    client = gated.daemon.client
    with gated.held("save", "prepare", guest.save) as first:
        number = len(gated.operations)
        waiting = Aside(guest.pause)
        eventually("the second operation", lambda: len(gated.operations) > number, WAIT_S)

        def waits() -> bool:
            with contextlib.suppress(OperationNotFound):  # it is on its way
                return client.operation(gated.operations[-1]).step == "waiting for its turn"
            return False

        eventually("its place in the line", waits, WAIT_S)
        client.cancel(gated.operations[-1])
        assert isinstance(waiting.wait(), Cancelled)
        assert not first.ends_within(0)
    assert first.wait() is None
    assert guest.state == "running"
