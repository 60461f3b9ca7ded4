"""A packed snapshot, and a pager that has its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from diapause.catalog import SnapshotRecord
from diapause.pager.client import Pager
from diapause.sandbox.host import Host
from diapause.store.home import Home
from tests.framework import captured_home as made
from tests.framework.pagers import spec


@pytest.fixture
def host(home: Home) -> Iterator[Host]:
    with made.host_of(home) as host:
        yield host


@pytest.fixture
def record(host: Host) -> SnapshotRecord:
    """A packed snapshot; its flat files are what it has to read as."""
    return made.packed(host)


@pytest.fixture
def pager(host: Host, record: SnapshotRecord) -> Iterator[Pager]:
    """A pager that has its files."""
    with contextlib.closing(Pager(host.home)) as pager:
        pager.pair(start=True)
        for device in record.devices:
            pager.put(f"{record.id}.{device.name}", spec(host, record, device.name))
        yield pager
