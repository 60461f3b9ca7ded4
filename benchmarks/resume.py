"""Resuming: against booting, against doing it by hand; and what forks share."""

from __future__ import annotations

import time

from benchmarks.by_hand import ByHand, scratch_of
from benchmarks.guest import Bench
from benchmarks.rows import Figure, Row
from diapause._core import PAGE_SIZE
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


def warm(bench: Bench) -> list[Row]:
    """A run from its ready snapshot, against a fork of a snapshot of the same age."""
    first = bench.client.run(RunRequest())
    parent = bench.client.inspect(first.sandbox).parent
    assert parent is not None
    bench.settle(parent)
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
    alone = bench.ram(first)
    bench.remove(first)
    found = bench.fork(snapshot, FORKS)
    at_once = [_private_pages(bench.ram(fork)) for fork in found]
    maps = [bench.ram(fork) for fork in found]
    bench.remove(*found, guest)
    together = sum(ram["Pss"] for ram in maps)
    private = sum(ram["Anonymous"] for ram in maps)
    allowed = Figure("PSS of one + 1.2 x private pages", "bytes", (alone["Pss"] + 1.2 * private,))
    bound = Figure("the bound", "pages", (float(IDLE_PAGES_MAX),))
    owned = Figure("owned", "pages", tuple(map(float, [_private_pages(alone), *at_once])))
    return [
        Row("guest RAM of 8 forks", Figure("PSS", "bytes", (float(together),)), allowed, 1.0),
        Row("pages of an idle fork when ready", owned, bound, 1.0, {"largest": max(at_once)}),
    ]


def _private_pages(ram: dict[str, int]) -> int:
    return ram["Anonymous"] // PAGE_SIZE
