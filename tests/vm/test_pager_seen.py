"""What can be seen of a guest that is served on demand, while it runs."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest

from diapause import _core
from diapause.model import ResumeRequest
from tests.framework.sandbox import DISK_BYTES, MEMORY_BYTES, Daemon, Sandbox
from tests.vm.test_seen import value

pytestmark = pytest.mark.vm

ONDEMAND = ResumeRequest(memory_mode="ondemand")


def served(guest: Sandbox) -> dict[str, Any]:
    found = guest.inspect().served
    assert found is not None
    assert "error" not in found, found
    return found


def test_what_is_in_memory_and_what_is_not_yet(daemon: Daemon, guest: Sandbox) -> None:
    """It grows with what the guest touches; both together are the whole of its files."""
    digests = guest.rewrite(8 * 1024)
    daemon.packed(guest.pause("disk").snapshot)
    daemon.client.resume(guest.id, ONDEMAND)
    before = served(guest)
    assert 0 < before["resident_bytes"] < MEMORY_BYTES
    assert guest.digests() == digests
    after = served(guest)
    assert after["resident_bytes"] >= before["resident_bytes"] + (8 << 20)
    for seen in (before, after):
        assert seen["resident_bytes"] + seen["pending_bytes"] == MEMORY_BYTES + DISK_BYTES
    metrics = daemon.client.metrics()
    assert value(metrics, "diapause_served_resident_bytes") >= after["resident_bytes"]
    assert value(metrics, "diapause_served_pending_bytes") > 0
    assert value(metrics, "diapause_stalled") == 0


def test_it_is_seen_while_the_pager_stands(daemon: Daemon, guest: Sandbox) -> None:
    """What lies in memory is counted by the kernel: the pager is not asked."""
    snapshot = guest.pause("disk").snapshot
    daemon.client.resume(guest.id, ONDEMAND)
    pid, vmm = daemon.client.doctor().pager_pid, guest.vmm_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        memory, nobody = _core.cached_bytes(vmm, [f"{snapshot}.memory", "nobody.memory"])
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have been replaced
            os.kill(pid, signal.SIGCONT)
    assert nobody is None
    assert memory is not None
    assert 0 < memory < MEMORY_BYTES


def test_reads_are_counted_by_where_they_came_from(daemon: Daemon, guest: Sandbox) -> None:
    """With their bytes and times, over the life of a pager; a file that goes takes none along."""
    digests = guest.rewrite()
    daemon.packed(guest.pause("disk").snapshot)
    before = daemon.client.metrics()
    daemon.client.resume(guest.id, ONDEMAND)
    assert guest.digests() == digests
    after = daemon.client.metrics()

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    reads = grown("diapause_pager_read_seconds_count", source="local")
    assert reads > 0
    assert grown("diapause_pager_read_seconds_bucket", source="local", le="+Inf") == reads
    assert grown("diapause_pager_read_seconds_sum", source="local") > 0
    assert grown("diapause_pager_read_bytes_total", source="local") >= 4096 * reads
    assert value(after, "diapause_pager_read_seconds_count", source="remote") == 0
    assert value(after, "diapause_pager_stalls_total") == 0
