"""Many saves of one guest, a large disk behind it, a large memory around it."""

from __future__ import annotations

from benchmarks.guest import Bench
from benchmarks.rows import Figure, Row
from diapause.model import CaptureAnswer, ResumeRequest
from diapause.units import GIB, MIB, PAGE_SIZE

SAVES = 20
ROUNDS = 5
_HEADROOM_BYTES = 128 * 1024


def twenty_saves(bench: Bench) -> list[Row]:
    """The 20th save of a running guest costs what the 2nd did; each forks to its own value."""
    guest = bench.boot()
    bench.run(guest, "dd if=/dev/urandom of=/tmp/written bs=1M count=256 2>/dev/null")
    answers: list[CaptureAnswer] = []
    for number in range(SAVES):
        bench.run(guest, f"echo {number} > /tmp/counter")
        bench.dirty(guest)
        answers.append(bench.save(guest))
    stored = [bench.client.inspect_snapshot(a.snapshot).stored_bytes for a in answers]
    right = _forks_to_their_own(bench, answers)
    bench.remove(guest)

    def row(what: str, unit: str, values: list[float]) -> Row:
        second, last = values[1], values[-1]
        notes = {"all": values, "forks_right": right}
        ours = Figure("the 20th save", unit, (last,))
        return Row(f"20 saves: {what}", ours, Figure("the 2nd", unit, (second,)), 1.3, notes)

    assert right == SAVES, right
    return [
        row("frozen", "ms", [a.frozen_ms for a in answers]),
        row("dirty pages", "pages", [a.dirty_pages for a in answers]),
        row("stored", "bytes", [float(b) for b in stored]),
    ]


def _forks_to_their_own(bench: Bench, answers: list[CaptureAnswer]) -> int:
    right = 0
    for number, answer in enumerate(answers):
        [fork] = bench.fork(answer.snapshot)
        right += bench.run(fork, "cat /tmp/counter") == str(number)
        bench.remove(fork)
    return right


def large_disk(bench: Bench) -> list[Row]:
    """1 GiB written to a disk of 2 GiB changes nothing; a busy disk costs at most three times."""
    idle = _frozen_rounds(bench, guest := bench.boot())
    bench.remove(guest)
    guest = bench.boot(disk_bytes=2 * GIB)
    bench.run(guest, "dd if=/dev/urandom of=/data/big bs=1M count=1024 2>/dev/null; sync")
    written = _frozen_rounds(bench, guest)
    writer = "while :; do dd if=/dev/urandom of=/data/busy bs=64k count=512 2>/dev/null; done"
    bench.run(guest, f"({writer}) > /dev/null 2>&1 &")
    busy = _frozen_rounds(bench, guest, rounds=2 * ROUNDS)
    bench.remove(guest)
    peer = Figure("idle disk", "ms", idle)
    return [
        Row("frozen, 1 GiB written to the disk", Figure("1 GiB written", "ms", written), peer, 1.3),
        Row("frozen beside a writer without sync", Figure("busy disk", "ms", busy), peer, 3.0),
    ]


def _frozen_rounds(bench: Bench, guest: str, rounds: int = ROUNDS) -> tuple[float, ...]:
    bench.save(guest)
    found = []
    for _ in range(rounds):
        bench.dirty(guest)
        found.append(bench.save(guest).frozen_ms)
    return tuple(found)


def large_memory(bench: Bench) -> list[Row]:
    """The same dirty set in 4 GiB (3 GiB in use) and in 512 MiB: the whole pause, to `process`."""
    small = _pauses(bench, 512 * MIB, 190)
    large = _pauses(bench, 4 * GIB, 3000)
    totals = [tuple(a.phases_ms["total"] for a in answers) for answers in (small, large)]
    notes = {
        "pages_small": [a.dirty_pages for a in small],
        "pages_large": [a.dirty_pages for a in large],
        "phases_large": [a.phases_ms for a in large],
    }
    return [
        Row(
            "whole pause as memory grows", Figure("4 GiB", "ms", totals[1]),
            Figure("512 MiB", "ms", totals[0]), 1.3, notes,
        )
    ]  # fmt: skip


def _pauses(bench: Bench, memory_bytes: int, fill_mib: int) -> list[CaptureAnswer]:
    guest = bench.boot(memory_bytes)
    bench.fill(guest, fill_mib)
    bench.pause(guest)
    answers = []
    for _ in range(ROUNDS):
        bench.client.resume(guest, ResumeRequest())
        bench.dirty(guest)
        answers.append(bench.pause(guest))
    bench.remove(guest)
    return answers


def stored_bytes(bench: Bench) -> list[Row]:
    """A second pause stores its changed pages; a pause right after a resume next to nothing."""
    guest = bench.boot()
    bench.fill(guest, 190)
    bench.dirty(guest)
    bench.pause(guest)
    bench.client.resume(guest, ResumeRequest())
    bench.dirty(guest)
    second = bench.client.inspect_snapshot(bench.pause(guest).snapshot)
    memory = next(d for d in second.devices if d.name == "memory")
    changed = _changed_bytes(bench, second.id)
    bench.client.resume(guest, ResumeRequest())
    at_once = bench.client.inspect_snapshot(bench.pause(guest).snapshot)
    bench.remove(guest)
    allowed = Figure("changed pages x 1.1 + 128 KiB", "bytes", (1.1 * changed + _HEADROOM_BYTES,))
    return [
        Row(
            "a second pause stores", Figure("stored", "bytes", (float(second.stored_bytes),)),
            allowed, 1.0, {"changed_bytes": changed, "memory": memory.stored_bytes},
        ),
        Row(
            "a pause right after a resume stores",
            Figure("stored", "bytes", (float(at_once.stored_bytes),)),
            Figure("4 MiB", "bytes", (4.0 * MIB,)), 1.0,
        ),
    ]  # fmt: skip


def _changed_bytes(bench: Bench, snapshot: str) -> int:
    """Pages whose bytes differ between a snapshot and its parent."""
    detail = bench.client.inspect_snapshot(snapshot)
    assert detail.parent is not None
    return sum(_differing(bench, snapshot, detail.parent, device.name) for device in detail.devices)


def _differing(bench: Bench, left: str, right: str, device: str) -> int:
    chunk, changed = 16 * MIB, 0
    ours, theirs = bench.flat(left, device), bench.flat(right, device)
    with ours.open("rb") as a, theirs.open("rb") as b:
        while (mine := a.read(chunk)) and (other := b.read(chunk)):
            if mine == other:
                continue
            for at in range(0, len(mine), PAGE_SIZE):
                changed += mine[at : at + PAGE_SIZE] != other[at : at + PAGE_SIZE]
    return changed * PAGE_SIZE
