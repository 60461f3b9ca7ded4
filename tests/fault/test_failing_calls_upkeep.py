"""One call fails, once, while something is removed, collected or made: nothing is lost by it.

`strace` injects the error into the real daemon at an exact call. Each verb is run for a sample of
its calls under `make test`, and for every one of them under `make soak`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest

from diapause.catalog import Catalog, now
from diapause.guest.images import Image
from diapause.model import CheckRequest, GcAnswer, GcRequest
from diapause.snapshot.manifest import manifest_bytes
from tests.framework.failing import Fault, Pick, faults, some, tried
from tests.framework.fake_home import eventually
from tests.framework.leftovers import nothing_left
from tests.framework.sandbox import WAIT_S, Daemon, Sandbox, real_home
from tests.framework.strace import recorded

pytestmark = pytest.mark.vm


class Place:
    """A home with a running guest and the packed snapshot that it began with."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.client = daemon, daemon.client
        self.guest = daemon.run()
        self.base = self.guest.save("disk").snapshot
        daemon.packed(self.base)
        self.written = self.guest.rewrite(64)

    def spare(self) -> str:
        """A snapshot that shares everything with the base but its name and its files."""
        home, made = self.daemon.home, os.urandom(8).hex()
        place = shutil.copytree(home.snapshot(self.base), home.snapshot(made))
        with contextlib.closing(Catalog(home.catalog)) as catalog:
            found = catalog.snapshot(self.base)
            assert found is not None
            record = msgspec.structs.replace(found, id=made)
            (place / "manifest.json").unlink()
            (place / "manifest.json").write_bytes(manifest_bytes(record))
            catalog.put_snapshot(record, durable=True)
        return made

    def garbage(self) -> None:
        """A snapshot that was removed, a build that nobody names, flat files of nobody."""
        home, spare = self.daemon.home, self.spare()
        with contextlib.closing(Catalog(home.catalog)) as catalog:
            found = catalog.snapshot(spare)
            assert found is not None
            gone = msgspec.structs.replace(found, removed_at=now())
            catalog.put_snapshot(gone, durable=True)
        (home.builds / os.urandom(32).hex()).write_bytes(b"nobody's")
        flat = home.flat_of(spare)
        flat.mkdir()
        (flat / "flat.json").write_text("{}")

    def collect(self, *, dry_run: bool = False) -> GcAnswer:
        """gc."""
        return self.client.gc(GcRequest(dry_run=dry_run))

    def whole(self) -> None:
        """Nothing was lost, and nothing is left that nobody owns."""
        assert self.guest.digests() == self.written
        assert self.client.check(CheckRequest()).damage == []
        with self.guest.forked(self.base):
            pass
        nothing_left(self.daemon.home)

    def ids(self) -> set[str]:
        """Every sandbox there is."""
        return {row.sandbox for row in self.client.sandboxes(everything=True)}

    def comes_to(self, count: int, fault: Fault) -> None:
        """There are so many sandboxes; what could not be put back at once is settled soon after."""
        eventually(f"an end of {fault}", lambda: len(self.ids()) == count, WAIT_S)


@pytest.fixture(scope="module")
def place(tiny_image: Image) -> Iterator[Place]:
    with real_home(tiny_image) as made:
        yield Place(made)


def _gc(place: Place, pick: Pick) -> None:
    place.garbage()
    with recorded(place.daemon.pid) as calls:
        assert {item.kind for item in place.collect().items} >= {"snapshot", "build", "flat"}
    for fault in pick(faults(calls)):
        place.garbage()
        tried(place.daemon, fault, place.collect)
        place.collect()
        assert place.collect(dry_run=True).items == [], fault
        assert [row.id for row in place.client.snapshots()] == [place.base], fault


def _snapshot_rm(place: Place, pick: Pick) -> None:
    def remove(snapshot: str) -> None:
        place.client.remove_snapshot(snapshot)

    first = place.spare()
    with recorded(place.daemon.pid) as calls:
        remove(first)
    for fault in pick(faults(calls)):
        spare = place.spare()
        done = tried(place.daemon, fault, partial(remove, spare))
        left = {row.id for row in place.client.snapshots()}
        assert left <= {place.base, spare}, fault
        assert place.base in left, fault
        assert not done or spare not in left, fault
        remove(spare)
    place.collect()


def _rm(place: Place, pick: Pick) -> None:
    [first] = place.daemon.fork(place.base)
    with recorded(place.daemon.pid) as calls:
        first.remove()
    for fault in pick(faults(calls)):
        [guest] = place.daemon.fork(place.base)
        done = tried(place.daemon, fault, guest.remove)
        assert not done or place.ids() == {place.guest.id}, fault
        guest.remove()
        assert place.ids() == {place.guest.id}, fault


def _starts(place: Place, pick: Pick, start: Callable[[], Sandbox]) -> None:
    with recorded(place.daemon.pid) as calls:
        first = start()
    first.remove()
    for fault in pick(faults(calls)):
        done = tried(place.daemon, fault, start)
        place.comes_to(1 + int(done), fault)
        for sandbox in place.ids() - {place.guest.id}:
            assert Sandbox(place.daemon, sandbox).sh("echo here") == "here\n", fault
            Sandbox(place.daemon, sandbox).remove()


def _fork(place: Place, pick: Pick) -> None:
    _starts(place, pick, lambda: place.daemon.fork(place.base)[0])


def _run(place: Place, pick: Pick) -> None:
    _starts(place, pick, place.daemon.run)


Verb = Callable[[Place, Pick], None]


@pytest.mark.parametrize(("verb", "size"), [(_gc, 10), (_snapshot_rm, 8), (_rm, 5), (_fork, 5)])
def test_a_failing_call(place: Place, verb: Verb, size: int) -> None:
    """Something of each kind of call."""
    verb(place, partial(some, size=size))
    place.whole()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", [_gc, _snapshot_rm, _rm, _fork, _run])
def test_every_failing_call(place: Place, verb: Verb) -> None:
    verb(place, list)
    place.whole()
