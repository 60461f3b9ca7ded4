"""Many guests of one snapshot on demand: what forks at once cost, what they share, and what the
pager and its keeper hold for 64 of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from pathlib import Path

from benchmarks.guest import Bench
from benchmarks.rows import Figure, Row
from diapause.pager.client import Pager, Pair
from diapause.units import MIB

ROUNDS = 3
FORKS, GUESTS = 16, 64
HELD_BYTES_MAX = 60 * MIB
SMALLEST_BYTES = 128 * MIB
_TICKS_S = os.sysconf("SC_CLK_TCK")


def forks(_: Bench) -> list[Row]:
    """16 at once: no slower than the processors allow, and one copy of what they only read."""
    bench = Bench()
    try:
        guest = bench.boot()
        bench.fill(guest, 190)
        snapshot = bench.pause(guest).snapshot
        bench.remove(*bench.fork(snapshot))  # the pair runs, what every fork reads is warm
        alone = [_one(bench, snapshot) for _round in range(ROUNDS)]
        took, idle = [], []
        for at in range(ROUNDS):
            idle_before, began = _idle_s(), time.perf_counter()
            found = bench.fork(snapshot, FORKS)
            took.append(time.perf_counter() - began)
            idle.append(round(_idle_s() - idle_before, 2))
            if at < ROUNDS - 1:
                bench.remove(*found)
        maps = [bench.ram(fork) for fork in found]
        bench.remove(*found, guest)
    finally:
        bench.close()
    cores = len(os.sched_getaffinity(0))
    cpu = Figure(
        f"16 x one fork's CPU over {cores} cores", "s",
        tuple(FORKS * seconds / cores for seconds, _ in alone),
    )  # fmt: skip
    pss = sum(ram["Pss"] for ram in maps)
    private = sum(ram["Anonymous"] for ram in maps)
    one = min(ram["Pss"] for _, ram in alone)
    allowed = Figure("PSS of one + 1.2 x private pages", "bytes", (one + 1.2 * private,))
    notes = {"private_bytes": private, "pss_of_one": one}
    return [
        Row(
            "16 forks on demand, all ready", Figure("forks", "s", tuple(took)), cpu, 1.25,
            {"idle_s": idle},
        ),
        Row("guest RAM of 16 forks on demand", Figure("PSS", "bytes", (pss,)), allowed, 1, notes),
    ]  # fmt: skip


def holders(_: Bench) -> list[Row]:
    """What pager and keeper hold beside the page cache, with 64 guests."""
    bench = Bench()
    try:
        guest = bench.boot(SMALLEST_BYTES)
        snapshot = bench.pause(guest).snapshot
        found = [fork for _round in range(GUESTS // FORKS) for fork in bench.fork(snapshot, FORKS)]
        for fork in found:
            served = bench.client.inspect(fork).served
            assert served is not None
            assert "error" not in served, served
        pair = _pair(bench)
        held = {
            name: _held(pid) for name, pid in (("pager", pair.pid), ("keeper", pair.keeper_pid))
        }
        bench.remove(*found, guest)
    finally:
        bench.close()
    ours = Figure("pager and keeper", "bytes", (float(sum(held.values())),))
    bound = Figure("at most", "bytes", (float(HELD_BYTES_MAX),))
    return [Row("pager and keeper with 64 guests", ours, bound, 1, held)]


def _one(bench: Bench, snapshot: str) -> tuple[float, dict[str, int]]:
    """One fork: the CPU seconds of all who work for it, and its guest RAM."""
    pair = _pair(bench)
    workers = (int(bench.home.serve_lock.read_text().split()[0]), pair.pid, pair.keeper_pid)
    before = sum(map(_cpu_s, workers))
    [fork] = bench.fork(snapshot)
    seconds = sum(map(_cpu_s, workers)) - before + _cpu_s(_vmm(bench, fork))
    ram = bench.ram(fork)
    bench.remove(fork)
    return seconds, ram


def _pair(bench: Bench) -> Pair:
    with contextlib.closing(Pager(bench.home)) as pager:
        return pager.pair(start=False)


def _vmm(bench: Bench, sandbox: str) -> int:
    vmm = bench.client.inspect(sandbox).vmm
    assert vmm is not None
    return vmm.pid


def _cpu_s(pid: int) -> float:
    """Processor time of a process and of the children that it has waited for.

    Its own to the nanosecond: /proc has ticks of 10 ms, cut off, of which a fork takes ten.
    """
    clock = ctypes.c_int()
    failed = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    assert failed == 0, os.strerror(failed)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(clock.value) + sum(map(int, fields[13:15])) / _TICKS_S


def _idle_s() -> float:
    """How long the processors that we may run on have had nothing to do, together: forks that take
    long while they are never idle share them with somebody else."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = map(str.split, Path("/proc/stat").read_text().splitlines())
    return sum(sum(map(int, line[4:6])) for line in lines if line[0] in ours) / _TICKS_S


def _held(pid: int) -> int:
    """What a process has of its own: anonymous pages, and file pages that nobody else maps."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE))
    return (int(sizes["Anonymous"]) + int(sizes["Private_Clean"])) * 1024
