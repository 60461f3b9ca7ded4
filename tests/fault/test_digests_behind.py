"""Digests that are made behind, beside a collection: neither keeps the other's files."""

from __future__ import annotations

import threading

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

            def endless(*_: object, progress: object, **__: object) -> int:
                """A reading that lasts until it is told to stop."""
                assert callable(progress)
                begun.set()
                with found.host.leases.hold(gone):
                    while True:
                        progress(1, 2)

            monkeypatch.setattr(digests, "make", endless)
            digests.make_behind(record)
            assert begun.wait(WAIT_S)
            found.engine.remove_snapshot(gone)
            assert gone in found.engine.gc(GcRequest()).snapshots
            monkeypatch.undo()
            found.host.flats.ensure(found.snapshots[kept])
            sums = daemon.home.flat_of(kept) / "memory.sums"
            eventually("digests of what is left", sums.exists, WAIT_S)
