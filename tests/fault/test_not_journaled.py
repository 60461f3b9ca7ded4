"""A verb that can't be journaled: at its begin nothing came of it; later it is put back or done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diapause.errors import DiapauseError
from diapause.guest.images import Image
from tests.framework.catalog_tap import Place, Tap, before_step
from tests.framework.fake_home import eventually
from tests.framework.leftovers import nothing_left
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def guests(daemon: Daemon) -> tuple[Sandbox, Sandbox]:
    """One that runs, and one that is paused."""
    running = daemon.run()
    [paused] = daemon.fork(running.save("disk").snapshot)
    daemon.packed(paused.pause("disk").snapshot)
    return running, paused


def _states(daemon: Daemon) -> dict[str, str]:
    return {row.sandbox: row.state for row in daemon.client.sandboxes(everything=True)}


def _verbs(daemon: Daemon, running: Sandbox, paused: Sandbox) -> dict[str, Callable[[], object]]:
    snapshot = running.inspect().parent
    assert snapshot is not None
    return {
        "run": daemon.run,
        "fork": partial(daemon.fork, snapshot),
        "resume": paused.resume,
        "pause": partial(running.pause, "disk"),
        "save": partial(running.save, "disk"),
        "freeze": running.freeze,
        "restore": partial(paused.restore, snapshot),
        "snapshot-rm": partial(daemon.client.remove_snapshot, snapshot),
        "rm": partial(daemon.client.remove, running.id, force=True),
    }


@pytest.mark.parametrize(
    "verb", ["run", "fork", "resume", "pause", "save", "freeze", "restore", "snapshot-rm", "rm"]
)
def test_it_is_as_if_nobody_had_asked(
    daemon: Daemon, guests: tuple[Sandbox, Sandbox], verb: str
) -> None:
    """A new sandbox has its row before its verb is journaled: that row goes as well."""
    before, snapshots = _states(daemon), daemon.client.snapshots()
    tap = Tap(daemon.home)
    tap.fail(Place(f"the begin of {verb}", "operations", f"NEW.verb = '{verb}'"))
    with pytest.raises(DiapauseError):
        _verbs(daemon, *guests)[verb]()
    tap.clear()
    eventually("that nothing is left of it", lambda: _states(daemon) == before, WAIT_S)
    assert daemon.client.snapshots() == snapshots
    running, _ = guests
    assert running.sh("echo here") == "here\n"
    nothing_left(daemon.home)


@pytest.mark.parametrize("step", ["kill", "files", "publish"])
def test_a_removal_that_failed_half_way_is_finished(
    daemon: Daemon, guests: tuple[Sandbox, Sandbox], step: str
) -> None:
    """There is no way back from it, so nobody has to ask again."""
    before = _states(daemon)
    snapshot = guests[0].inspect().parent
    assert snapshot is not None
    [fork] = daemon.fork(snapshot)
    tap = Tap(daemon.home)
    tap.fail(before_step("rm", step))
    with pytest.raises(DiapauseError):
        fork.remove()
    tap.clear()
    eventually("its end", lambda: _states(daemon) == before, WAIT_S)
    nothing_left(daemon.home)
