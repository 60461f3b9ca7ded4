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
        names = [f"{snapshot}.memory", "nobody.memory"]
        memory, nobody = _core.cached_bytes(vmm, [(name, "/nowhere") for name in names])
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have been replaced
            os.kill(pid, signal.SIGCONT)
    assert nobody is None
    assert memory is not None
    resident, passed = memory
    assert not passed
    assert resident is not None
    assert 0 < resident < MEMORY_BYTES


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


def test_how_much_of_what_was_brought_ahead_was_used(daemon: Daemon, guest: Sandbox) -> None:
    """It grows with what the guest touches, and so do the sums over all guests."""
    digests = guest.rewrite(4096)
    daemon.packed(guest.pause("disk").snapshot)
    daemon.client.resume(guest.id, ONDEMAND)
    assert guest.digests() == digests
    daemon.packed(guest.pause("disk").snapshot)
    metrics = daemon.client.metrics()
    answer = daemon.client.resume(guest.id, ONDEMAND)
    assert answer.prefetched_pages is not None
    assert answer.used_pages is not None
    at_first = served(guest)["prefetch"]
    assert at_first["prefetched_pages"] == answer.prefetched_pages > 0
    assert at_first["used_pages"] >= answer.used_pages
    assert guest.digests() == digests
    prefetch = served(guest)["prefetch"]
    used, brought = prefetch["used_pages"], prefetch["prefetched_pages"]
    assert used >= at_first["used_pages"] + (4096 // 4) // 2
    assert prefetch["hit_rate"] == round(used / brought, 4)
    assert prefetch["late"] is False
    after = daemon.client.metrics()
    for name in ("prefetched", "prefetch_used"):
        metric = f"diapause_pager_{name}_bytes_total"
        assert value(after, metric) > value(metrics, metric)


def test_a_trace_outlives_the_pager_that_saw_it_begin(daemon: Daemon, guest: Sandbox) -> None:
    """What a guest touched before and after a pager's death is brought ahead of the next."""
    digests = guest.rewrite(4096)
    first = guest.pause("disk").snapshot
    daemon.packed(first)
    for trace in daemon.home.traces.glob("*.memory"):
        trace.unlink()
    daemon.client.resume(guest.id, ONDEMAND)
    assert guest.digests() == digests
    pid = daemon.client.doctor().pager_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    prefetch = served(guest)["prefetch"]
    assert prefetch == {"prefetched_pages": 0, "used_pages": 0, "hit_rate": None, "late": True}
    daemon.packed(guest.pause("disk").snapshot)
    trace = daemon.home.traces / f"{first}.memory"
    granules = (trace.stat().st_size - 64) // 8
    assert granules >= 4096 // 64
    answer = daemon.client.resume(guest.id, ONDEMAND)
    assert answer.prefetched_pages is not None
    assert answer.prefetched_pages >= granules * 16 // 2
    assert guest.digests() == digests
    assert served(guest)["prefetch"]["used_pages"] >= 4096 // 4 // 2
