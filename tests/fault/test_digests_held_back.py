"""Digests that do not stand back in time for a collection: it goes on after a bound, keeps what is
being read, and the next one finds it. No guest is needed: the files are real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from diapause.catalog import SnapshotRecord
from diapause.model import GcRequest
from diapause.sandbox.engine import Engine
from diapause.sandbox.host import Host
from diapause.snapshot import sums
from diapause.store.home import Home
from tests.framework import captured_home as made
from tests.framework.fake_home import eventually

WAIT_S = 120.0


@pytest.fixture
def host(home: Home) -> Iterator[Host]:
    with made.host_of(home) as host:
        yield host


class Stuck:
    """A reading that asks nobody whether it is wanted, until it is let go; then the real one."""

    def __init__(self, host: Host, record: SnapshotRecord, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self._really, self._snapshot = host.digests._sums, record.id
        patch.setattr(host.digests, "_sums", self)

    def __call__(self, record: SnapshotRecord, *arguments: Any) -> Any:
        if record.id == self._snapshot and not self.goes_on.is_set():
            self.begun.set()
            assert self.goes_on.wait(WAIT_S)
        arguments[-1](1, 2)  # as any reading that takes its time
        return self._really(record, *arguments)


@pytest.fixture
def stuck(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stuck, str]]:
    """One whose snapshot has been removed meanwhile."""
    monkeypatch.setattr(sums, "_BOUND_S", 0.5)
    record = made.packed(host, flat=False)
    reading = Stuck(host, record, monkeypatch)
    host.flats.ensure(record)
    assert reading.begun.wait(WAIT_S)
    Engine(host).remove_snapshot(record.id)
    yield reading, record.id
    reading.goes_on.set()


def test_a_collection_goes_on_and_keeps_what_is_read(host: Host, stuck: tuple[Stuck, str]) -> None:
    """It has waited for the bound; what nobody reads goes, and the reading ends in its own time."""
    reading, read = stuck
    idle = made.packed(host, flat=False, seed=50).id
    engine, stray = Engine(host), host.home.builds / ("0" * 64)
    stray.write_bytes(b"of nobody")
    engine.remove_snapshot(idle)
    files = sorted(path for path in host.home.snapshot(read).iterdir())
    for expected in ([idle], []):  # the second has to wait as well
        began = time.monotonic()
        assert engine.gc(GcRequest()).snapshots == expected
        assert time.monotonic() - began >= sums._BOUND_S
    assert not stray.exists()
    assert not host.home.snapshot(idle).exists()
    assert not reading.goes_on.is_set()
    assert sorted(path for path in host.home.snapshot(read).iterdir()) == files
    assert all((host.home.builds / build).exists() for build in _builds(host, read))
    reading.goes_on.set()
    eventually("the end of the reading", lambda: read not in host.leases.held(), WAIT_S)
    assert engine.gc(GcRequest()).snapshots == [read]
    assert not host.home.snapshot(read).exists()


def test_digests_are_made_again_after_a_collection_that_did_not_wait(
    host: Host, stuck: tuple[Stuck, str]
) -> None:
    """A bound that was reached leaves nothing held: neither digests nor a collection."""
    reading, read = stuck
    with host.digests.held_back():
        pass
    reading.goes_on.set()
    later = made.packed(host, seed=100)  # which waits for its digests
    with host.digests.held_back():
        assert read not in host.leases.held()
    Engine(host).remove_snapshot(later.id)
    assert {read, later.id} == set(Engine(host).gc(GcRequest()).snapshots)


def _builds(host: Host, snapshot: str) -> set[str]:
    [record] = [row for row in host.catalog.snapshots(removed=True) if row.id == snapshot]
    return {build for device in record.devices for build in device.builds}
