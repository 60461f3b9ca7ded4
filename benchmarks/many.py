"""A home that has grown: what verbs cost there, what reading all of it costs, and adopting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.guest import Bench, wait_for
from benchmarks.rows import Figure, Row
from diapause import _core
from diapause.driver.process import process_ref
from diapause.guest import images
from diapause.model import CaptureRequest, CheckRequest, GcRequest, ResumeRequest
from diapause.units import MIB
from tests.framework.big_home import SANDBOXES, SNAPSHOTS, multiply

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 7
ADOPTED = 16
MEMORY_BYTES = 128 * MIB


def many(_: Bench) -> list[Row]:
    """The same guest in the same home, before it has grown and afterwards; a home of its own."""
    bench = Bench()
    try:
        return _many(bench)
    finally:
        bench.close()


def _many(bench: Bench) -> list[Row]:
    guest = bench.boot(MEMORY_BYTES)
    saved = bench.save(guest, "disk").snapshot
    empty = _verbs(bench, guest)
    multiply(bench.home, saved)
    full = _verbs(bench, guest)
    size = f"{SANDBOXES} sandboxes, {SNAPSHOTS} snapshots"
    rows = [
        Row(f"{size}: {verb}", Figure(verb, "ms", full[verb]), Figure("alone", "ms", values), 1.2)
        for verb, values in empty.items()
    ]
    bench.client.gc(GcRequest())
    gc = _times(lambda: bench.client.gc(GcRequest()))
    rows.append(Row(f"{size}: gc of nothing", Figure("gc", "ms", gc), _bound(1000), 1))
    rows.append(_check(bench, f"{size}: check"))
    return rows


def _verbs(bench: Bench, guest: str) -> dict[str, tuple[float, ...]]:
    pauses = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        answer = bench.client.pause(guest, CaptureRequest())
        pauses.append((time.perf_counter() - began) * 1e3)
        bench.settle(answer.snapshot)
        bench.client.resume(guest, ResumeRequest())
    return {
        "ps from the shell": _times(lambda: _program(bench, "ps")),
        "inspect from the shell": _times(lambda: _program(bench, "inspect", guest)),
        "ps at the API": _times(bench.client.sandboxes),
        "inspect at the API": _times(lambda: bench.client.inspect(guest)),
        "pause": tuple(pauses),
    }


def _program(bench: Bench, *words: str) -> None:
    program = [sys.executable, "-m", "diapause", "--home", str(bench.home.root), *words]
    subprocess.run(program, check=True, capture_output=True, timeout=60)


def check(bench: Bench) -> list[Row]:
    """Two snapshots of 512 MiB, with their flat files."""
    guest = bench.boot()
    for _ in range(2):
        bench.fill(guest, 190)
        bench.remove(*bench.fork(bench.save(guest, "disk").snapshot))
    rows = [_check(bench, "check of two snapshots of 512 MiB")]
    bench.remove(guest)
    return rows


def _check(bench: Bench, what: str) -> Row:
    assert bench.client.check(CheckRequest()).damage == []  # makes digests where none are
    ours, peers = [], []
    with tempfile.TemporaryDirectory(dir=bench.home.root.parent) as directory:
        size = _data_of(bench, Path(directory))
        for _ in range(3):
            began = time.perf_counter()
            assert bench.client.check(CheckRequest()).recorded == 0
            ours.append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            _read_all(Path(directory))
            peers.append((time.perf_counter() - began) * 1e3)
    peer = Figure("reading and digests", "ms", tuple(peers))
    return Row(what, Figure("check", "ms", tuple(ours)), peer, 1 / 0.7, {"bytes": size})


def _data_of(bench: Bench, target: Path) -> int:
    """What a check reads, without the holes, which cost neither side anything; its size.

    An image's files have BLAKE2b digests, everything else has BLAKE3.
    """
    home = bench.home
    places = (home.snapshots, home.builds, home.flat, home.templates, home.images)
    size = 0
    for number, path in enumerate(path for place in places for path in place.rglob("*")):
        if path.is_file():
            kind = "image" if path.is_relative_to(home.images) else "blob"
            with path.open("rb") as source, (target / f"{kind}{number}").open("wb") as copy:
                size += _copy_data(source.fileno(), copy.fileno())
    return size


def _copy_data(source: int, target: int) -> int:
    end, at, copied = os.fstat(source).st_size, 0, 0
    while at < end:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # only a hole is left
            break
        at = os.lseek(source, begin, os.SEEK_HOLE)
        while begin < at:
            moved = os.sendfile(target, source, begin, at - begin)
            begin, copied = begin + moved, copied + moved
    return copied


def _read_all(directory: Path) -> None:
    """On as many threads as a check has."""
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as threads:
        list(threads.map(_digest, sorted(directory.iterdir(), reverse=True)))


def _digest(path: Path) -> object:
    return images.digest(path) if path.name.startswith("image") else _core.blake3_file(str(path))


def adopt(bench: Bench) -> list[Row]:
    """From starting a daemon to its first answer, with the guests of one that was killed."""
    guest = bench.boot(MEMORY_BYTES)
    forks = bench.fork(bench.save(guest, "disk").snapshot, ADOPTED)
    bench.remove(guest)
    ready = []
    for _ in range(3):
        _kill_daemon(bench)
        began = time.perf_counter()
        rows = bench.client.sandboxes()
        ready.append((time.perf_counter() - began) * 1e3)
        assert [row.state for row in rows] == ["running"] * ADOPTED
    bench.remove(*forks)
    ours = Figure("ready", "ms", tuple(ready))
    return [Row(f"a daemon that adopts {ADOPTED} guests", ours, _bound(1000), 1)]


def _kill_daemon(bench: Bench) -> None:
    pid = int(bench.home.serve_lock.read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: process_ref(pid) is None, "the daemon's end", 30.0)


def _times(call: Callable[[], object]) -> tuple[float, ...]:
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e3)
    return tuple(found)


def _bound(most_ms: float) -> Figure:
    return Figure("at most", "ms", (most_ms,))
