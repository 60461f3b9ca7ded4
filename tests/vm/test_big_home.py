"""Copies of a snapshot under ids of their own are as good as it: benchmarks measure real ones."""

from __future__ import annotations

import pytest

from diapause.guest.images import Image
from diapause.model import CheckRequest, GcRequest
from tests.framework.big_home import multiply
from tests.framework.sandbox import real_home

pytestmark = pytest.mark.vm


def test_a_multiplied_home_is_whole(tiny_image: Image) -> None:
    with real_home(tiny_image) as home:
        guest = home.run("first")
        digests = guest.rewrite()
        saved = guest.save("disk").snapshot
        home.packed(saved)
        multiply(home.home, saved, sandboxes=5, snapshots=20)
        found = home.client.check(CheckRequest())
        assert found.damage == []
        assert found.blobs >= 3 * 21
        assert home.client.gc(GcRequest()).snapshots == []
        assert len(home.client.sandboxes(everything=True)) == 6
        copies = [row for row in home.client.snapshots() if row.id != saved]
        assert len(copies) == 20
        with guest.forked(copies[-1].id) as fork:
            assert fork.digests() == digests
        paused = home.client.inspect(copies[0].sandbox)
        assert paused.state == "paused"
        assert paused.parent in {row.id for row in copies if row.sandbox == paused.id}
