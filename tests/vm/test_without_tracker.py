"""Without the tracker: what was written is not known, so pages are compared; all is exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diapause.guest.images import Image
from tests.framework.sandbox import Daemon, Sandbox, real_home

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    """A daemon that preloads nothing into QEMU."""
    with real_home(tiny_image, DIAPAUSE_TRACKER="off") as made:
        yield made


def test_every_verb_is_exact(daemon: Daemon, guest: Sandbox) -> None:
    """Save, save, fork, pause, resume; the second capture of a process compares."""
    guest.start_counter()
    assert not guest.inspect().tracker
    sources = []
    for number in range(3):
        digests = guest.rewrite()
        saved = guest.save("disk" if number % 2 else "process")
        sources.append(saved.dirty_source)
        value = guest.counted()
        with guest.forked(saved.snapshot) as fork:
            assert fork.digests() == digests
            fork.counts_beyond(value - 1)
    assert sources == ["private", "compared", "compared"]
    digests, value = guest.rewrite(), guest.counted()
    with guest.forked() as fork:
        assert fork.digests() == digests
    assert guest.pause().dirty_source == "compared"
    assert guest.resume().warm
    guest.counts_beyond(value)
    assert guest.digests() == digests
    assert guest.save().dirty_source == "private"


def test_what_is_reported_is_what_changed(guest: Sandbox) -> None:
    """A compared capture counts the pages that differ, not those that it looked at."""
    guest.sh("head -c 20000000 /dev/urandom >/tmp/large")
    first = guest.save()
    second = guest.save()
    assert second.dirty_source == "compared"
    assert second.dirty_pages < first.dirty_pages / 4
