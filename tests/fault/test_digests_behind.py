"""Digests that are made behind, beside a collection: neither keeps the other's files."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from diapause.guest.images import Image
from diapause.model import GcRequest
from tests.framework.fake_home import eventually
from tests.framework.power import opened
from tests.framework.sandbox import WAIT_S, real_home

pytestmark = pytest.mark.vm


def test_what_is_being_read_for_digests_is_collected_all_the_same(
    tiny_image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading stands back for the collection; of what is left it is done afterwards."""
    with real_home(tiny_image) as daemon:
        guest = daemon.run()
        gone, kept = guest.save("disk").snapshot, guest.save("disk").snapshot
        daemon.packed(kept)
        guest.remove()
        daemon.kill()
        with opened(daemon.home) as found:
            digests, record = found.host.digests, found.snapshots[gone]
            begun = threading.Event()

            def endless(*arguments: Any) -> None:
                """A reading that lasts until it is told to stop."""
                begun.set()
                while True:
                    arguments[-1](1, 2)

            monkeypatch.setattr(digests, "_sums", endless)
            found.host.flats.ensure(record)
            assert begun.wait(WAIT_S)
            assert gone in found.host.leases.held() - found.host.leases.held_firmly()
            found.engine.remove_snapshot(gone)
            planned = found.engine.gc(GcRequest(dry_run=True))
            assert gone in planned.snapshots
            assert found.engine.df().gc_bytes == planned.freed_bytes > 0
            collected = found.engine.gc(GcRequest())
            assert (collected.snapshots, collected.items) == (planned.snapshots, planned.items)
            monkeypatch.undo()
            found.host.flats.ensure(found.snapshots[kept])
            sums = daemon.home.flat_of(kept) / "memory.sums"
            eventually("digests of what is left", sums.exists, WAIT_S)
