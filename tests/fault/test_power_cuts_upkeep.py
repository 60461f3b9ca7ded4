"""The power goes at any call of a gc or of a snapshot rm: what is needed is there, and is whole.

`make test` opens a sample of the states, `make soak` every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from diapause.guest.images import Image
from diapause.model import GcAnswer, GcRequest
from diapause.store.home import Home
from tests.framework.catalog_tap import Tap
from tests.framework.cuts import Numbered, check_cuts, lost_but_named, sample
from tests.framework.fake_home import eventually
from tests.framework.power import Act, Opened, Recording, recording
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm

Pick = Callable[[Recording], list[Numbered]]


def every(made: Recording) -> list[Numbered]:
    return list(made.states())


@dataclass
class Yard:
    """A home with garbage of each kind, beside what is needed."""

    daemon: Daemon
    base: str  # a snapshot that stays
    removed: list[str]
    running: Sandbox  # maps the base's flat files
    booted: Sandbox  # was never captured: the only one that stands on templates
    template: bytes  # what tells one template of a disk from another


@pytest.fixture
def yard(tiny_image: Image) -> Iterator[Yard]:
    with real_home(tiny_image, DIAPAUSE_MEMORY_MODE="copy") as daemon:
        first, _ = daemon.run_as_asked()  # and keeps a ready snapshot
        first.rewrite(64)
        base = first.save("disk").snapshot
        daemon.packed(base)
        first.remove()
        [running] = daemon.fork(base)
        removed = [_packed_and_removed(daemon, base), _captured_and_removed(daemon, base)]
        booted = daemon.run()
        booted.rewrite(64)
        yield Yard(daemon, base, removed, running, booted, _template(daemon.home))


def _packed_and_removed(daemon: Daemon, base: str) -> str:
    """Its builds are nobody else's."""
    with Sandbox(daemon, "").forked(base) as fork:
        fork.rewrite()
        made = fork.save("disk").snapshot
        daemon.packed(made)
    daemon.client.remove_snapshot(made)
    return made


def _captured_and_removed(daemon: Daemon, base: str) -> str:
    [fork] = daemon.fork(base)
    with Tap(daemon.home).packing_fails():
        made = fork.save("disk").snapshot
        none_waits = "diapause_pack_queue 0.0"
        eventually("the pack's end", lambda: none_waits in daemon.client.metrics(), WAIT_S)
        fork.remove()
        daemon.client.remove_snapshot(made)
    return made


def _template(home: Home) -> bytes:
    [found] = home.templates.glob("ext4-*/template.json")
    return found.read_bytes()


def _of_gc(answer: GcAnswer) -> bytes:
    return f'"dry_run":false,"freed_bytes":{answer.freed_bytes}'.encode()


def _removal(daemon: Daemon, guest: Sandbox) -> Act:
    act = partial(daemon.client.remove, guest.id, force=True)
    return act, lambda _: b'"removed":["' + guest.id.encode()


def _collection(yard: Yard, pick: Pick) -> None:
    """A sandbox is removed, which is not synced, and what only it needed is collected."""
    daemon = yard.daemon
    collect: Act = partial(daemon.client.gc, GcRequest(dry_run=False)), _of_gc
    with recording(daemon, _removal(daemon, yard.booted), collect) as made:
        answer: GcAnswer = made.answers[1]
        kinds = {item.kind for item in answer.items}
        assert kinds == {"snapshot", "build", "flat", "capture", "template"}
        assert set(yard.removed) < set(answer.snapshots), "and a ready one"

        def holds(made: Recording, found: Opened, promised: int) -> None:
            assert found.snapshots[yard.base].state == "packed"
            lost_but_named(found, found.sandboxes[yard.running.id])
            known = {row.id for row in found.host.catalog.snapshots(removed=True)}
            assert promised < 2 or not known & set(answer.snapshots)
            booted = found.sandboxes.get(yard.booted.id)
            assert promised < 2 or booted is None
            if booted is not None and any(found.host.home.sandbox(booted.id).glob("*.qcow2")):
                assert _template(found.host.home) == yard.template

        check_cuts(made, pick(made), holds)


def test_a_collection(yard: Yard) -> None:
    """What is needed stays, the rest goes now or with the next gc."""
    _collection(yard, partial(sample, spread=7))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_state_of_a_collection(yard: Yard) -> None:
    _collection(yard, every)


def _templates_alone(yard: Yard, pick: Pick) -> None:
    """A gc that forgets no row: what it goes by is on the disk before a file goes."""
    daemon = yard.daemon
    daemon.client.gc(GcRequest(dry_run=False))
    collect: Act = partial(daemon.client.gc, GcRequest(dry_run=False)), _of_gc
    with recording(daemon, _removal(daemon, yard.booted), collect) as made:
        answer: GcAnswer = made.answers[1]
        assert answer.snapshots == []
        assert "template" in {item.kind for item in answer.items}
        check_cuts(made, pick(made), partial(_templates_hold, yard))


def _templates_hold(yard: Yard, made: Recording, found: Opened, promised: int) -> None:
    """A sandbox that is there has below its disk what it always had there."""
    booted = found.sandboxes.get(yard.booted.id)
    if booted is not None and any(found.host.home.sandbox(booted.id).glob("*.qcow2")):
        assert _template(found.host.home) == yard.template


def test_a_collection_that_forgets_no_row(yard: Yard) -> None:
    """The removal before it was not synced."""
    _templates_alone(yard, partial(sample, spread=2))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_state_of_a_collection_that_forgets_no_row(yard: Yard) -> None:
    _templates_alone(yard, every)


def _snapshot_removal(yard: Yard, pick: Pick) -> None:
    daemon = yard.daemon
    with yard.running.forked() as fork:
        kept = fork.save("disk").snapshot
        daemon.packed(kept)

        def holds(made: Recording, found: Opened, promised: int) -> None:
            assert found.snapshots[yard.base].state == "packed"
            lost_but_named(found, found.sandboxes[yard.running.id])
            assert kept not in found.snapshots or not promised

        act = partial(daemon.client.remove_snapshot, kept)
        with recording(daemon, (act, lambda _: b'"removed":["' + kept.encode())) as made:
            check_cuts(made, pick(made), holds)


def test_a_removal_of_a_snapshot(yard: Yard) -> None:
    """There whole, or gone; once it was said, gone."""
    _snapshot_removal(yard, partial(sample, spread=3, last=1))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_state_of_a_removal_of_a_snapshot(yard: Yard) -> None:
    _snapshot_removal(yard, every)
