"""gc again and again beside everything that makes and uses shared files: nothing is lost."""

from __future__ import annotations

import threading

import pytest

from diapause.model import GcRequest
from tests.framework.sandbox import Aside, Daemon, Sandbox

pytestmark = pytest.mark.vm
ROUNDS = 4


def test_a_loop_of_gc_beside_pauses_resumes_and_forks(daemon: Daemon, guest: Sandbox) -> None:
    """Each round leaves garbage: its own snapshots, their flat files, and a fork that is gone."""
    guest.start_counter()
    done = threading.Event()

    def collect() -> int:
        freed = 0
        while not done.is_set():
            freed += daemon.client.gc(GcRequest()).freed_bytes
        return freed

    aside = Aside(collect)
    try:
        for _ in range(ROUNDS):
            digests, value = guest.rewrite(), guest.counted()
            saved = guest.save("process").snapshot
            with guest.forked(saved) as fork:
                assert fork.digests() == digests
            daemon.client.remove_snapshot(saved)
            paused = guest.pause("disk").snapshot
            guest.resume()
            assert guest.digests() == digests
            guest.counts_beyond(value)
            daemon.client.remove_snapshot(paused)
    finally:
        done.set()
    assert aside.result() > 0
