"""Resuming: against booting, against doing it by hand; and what forks share."""

from __future__ import annotations

import re
import time
from pathlib import Path

from benchmarks.by_hand import ByHand, scratch_of
from benchmarks.guest import Bench
from benchmarks.rows import Figure, Row
from diapause._core import GuestRam
from diapause.model import ResumeAnswer, ResumeRequest, RunRequest

ROUNDS = 7
BOOTS = 3
FORKS = 8
IDLE_PAGES_MAX = 1000


def resumes(bench: Bench) -> list[Row]:
    """A resume, spawn included, to an answering agent."""
    boots = _boots(bench)
    guest = bench.boot()
    bench.fill(guest, 190)
    bench.pause(guest)
    answers: list[ResumeAnswer] = []
    by_hand: list[float] = []
    for _ in range(ROUNDS):
        answers.append(bench.client.resume(guest, ResumeRequest()))
        snapshot = bench.pause(guest, "disk").snapshot
        wait_for_flat(bench, snapshot)
        by_hand.append(_by_hand(bench, snapshot))
    bench.remove(guest)
    whole = tuple(a.ready_ms for a in answers[1:])
    bare = tuple(a.ready_ms - a.phases_ms["materialize"] for a in answers[1:])
    notes = {"phases": [a.phases_ms for a in answers]}
    hand = Figure("spawn, load and greet by hand", "ms", tuple(by_hand[1:]))
    return [
        Row("resume to an answering agent", Figure("resume", "ms", whole), boots, 1 / 4, notes),
        Row("the same without materialize", Figure("resume", "ms", bare), hand, 1.5),
    ]


def _boots(bench: Bench) -> Figure:
    found = []
    for _ in range(BOOTS):
        answer = bench.client.run(RunRequest(boot=True))
        found.append(answer.ready_ms)
        bench.remove(answer.sandbox)
    return Figure("booting the same image", "ms", tuple(found))


def wait_for_flat(bench: Bench, snapshot: str) -> None:
    """A pause makes them behind itself."""
    from benchmarks.guest import wait_for

    known = bench.home.flat_of(snapshot) / "flat.json"
    wait_for(known.exists, "the flat files behind a pause")


def warm(bench: Bench) -> list[Row]:
    """A run from its ready snapshot, against a fork of a snapshot of the same age."""
    first = bench.client.run(RunRequest())
    parent = bench.client.inspect(first.sandbox).parent
    assert parent is not None
    bench.settle(parent)
    wait_for_flat(bench, parent)
    runs: list[float] = []
    peers: list[float] = []
    boots = [first.ready_ms]
    for _ in range(ROUNDS):
        began = time.perf_counter()
        answer = bench.client.run(RunRequest())
        runs.append((time.perf_counter() - began) * 1e3)
        assert answer.warm, answer.notes
        began = time.perf_counter()
        [fork] = bench.fork(parent)
        peers.append((time.perf_counter() - began) * 1e3)
        bench.remove(answer.sandbox, fork)
    bench.remove(first.sandbox)
    forked = Figure("a fork", "ms", tuple(peers))
    return [
        Row(
            "run to an answering agent", Figure("warm run", "ms", tuple(runs)), forked, 1.5,
            {"first_run_ms": boots},
        ),
    ]  # fmt: skip


def _by_hand(bench: Bench, snapshot: str) -> float:
    peer = ByHand(bench, snapshot, scratch_of(bench))
    took = peer.start()
    peer.stop()
    return took


def forks(bench: Bench) -> list[Row]:
    """8 forks share the clean pages, and own only what they write."""
    guest = bench.boot()
    bench.fill(guest, 190)
    snapshot = bench.pause(guest).snapshot
    [first] = bench.fork(snapshot)
    idle = _private_pages(bench, first)
    alone = _pss(bench, first)
    bench.remove(first)
    found = bench.fork(snapshot, FORKS)
    at_once = [_private_pages(bench, fork) for fork in found]
    together = sum(_pss(bench, fork) for fork in found)
    private = sum(_private_pages(bench, fork) * 4096 for fork in found)
    bench.remove(*found, guest)
    allowed = Figure("PSS of one + 1.2 x private pages", "bytes", (alone + 1.2 * private,))
    bound = Figure("the bound", "pages", (float(IDLE_PAGES_MAX),))
    owned = Figure("owned", "pages", tuple(map(float, [idle, *at_once])))
    return [
        Row("guest RAM of 8 forks", Figure("PSS", "bytes", (float(together),)), allowed, 1.0),
        Row("pages of an idle fork when ready", owned, bound, 1.0, {"largest": max(at_once)}),
    ]


def _pid(bench: Bench, sandbox: str) -> int:
    vmm = bench.client.inspect(sandbox).vmm
    assert vmm is not None
    return vmm.pid


def _memory_of(bench: Bench, sandbox: str) -> Path:
    parent = bench.client.inspect(sandbox).parent
    assert parent is not None
    return bench.home.flat_of(parent) / "memory"


def _private_pages(bench: Bench, sandbox: str) -> int:
    detail = bench.client.inspect(sandbox)
    ram = GuestRam(_pid(bench, sandbox), str(_memory_of(bench, sandbox)), detail.memory_bytes)
    return ram.estimate("private")


def _pss(bench: Bench, sandbox: str) -> int:
    """PSS of the guest RAM's mapping alone, bytes."""
    memory = str(_memory_of(bench, sandbox))
    total, inside = 0, False
    for line in Path(f"/proc/{_pid(bench, sandbox)}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(memory)
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    assert total > 0, memory
    return total
