"""From the request to the first byte of a guest that prints a tick every millisecond: guests of
512 MiB and of 8 GiB, most of it in use, on demand and copied first.

Builds lie in the page cache as far as they fit there, which helps `copy` most. No flat file is
there when a resume begins, as after a collection.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Literal

from benchmarks.guest import Bench, wait_for
from benchmarks.rows import Figure, Row
from diapause.model import GcRequest, ResumeAnswer, ResumeRequest
from diapause.units import GIB, MIB

ROUNDS = 7
COPIES = 2
SMALL_BYTES, SMALL_NOISE_MIB = 512 * MIB, 350
LARGE_BYTES, LARGE_NOISE_MIB = 8 * GIB, 6 * 1024 + 256
_LOOK_EVERY_S = 0.0003


class Ticker:
    """A paused guest with the program in it."""

    def __init__(self, bench: Bench, memory_bytes: int, noise_mib: int) -> None:
        self.bench, self.guest = bench, bench.boot(memory_bytes)
        self.console = bench.home.sandbox(self.guest) / "console.log"
        self.answers: list[ResumeAnswer] = []
        bench.put_program(self.guest, "ticks")
        start = f"setsid /tmp/ticks {noise_mib} </dev/null >/dev/ttyS0 2>&1 &"
        bench.run(self.guest, f"sh -c '{start}'")
        full = f"{noise_mib * MIB}".encode()
        wait_for(lambda: full in self.console.read_bytes(), "the guest's memory")
        self.snapshot = bench.pause(self.guest).snapshot
        devices = bench.client.inspect_snapshot(self.snapshot).devices
        [stored] = [device.stored_bytes for device in devices if device.name == "memory"]
        assert stored >= noise_mib * MIB, stored  # noise does not compress: so much is not zero

    def first_tick_ms(self, mode: Literal["ondemand", "copy"]) -> float:
        """Resume; from the request to the first byte on the console; paused again afterwards."""
        self.bench.client.gc(GcRequest())
        assert not self.bench.home.flat_of(self.snapshot).exists()
        os.sync()
        before = self.console.stat().st_size
        resume = threading.Thread(target=self._resume, args=(mode,))
        began = time.perf_counter()
        resume.start()
        while self.console.stat().st_size == before:
            assert resume.is_alive() or self.console.stat().st_size > before
            time.sleep(_LOOK_EVERY_S)
        took = (time.perf_counter() - began) * 1e3
        resume.join()
        self.snapshot = self.bench.pause(self.guest).snapshot
        return took

    def _resume(self, mode: Literal["ondemand", "copy"]) -> None:
        answer = self.bench.client.resume(self.guest, ResumeRequest(memory_mode=mode))
        assert answer.memory_mode == mode, answer.notes
        self.answers.append(answer)


def measure(_: Bench) -> list[Row]:
    """In a home of their own: what they leave takes 14 GB of disk."""
    bench = Bench()
    try:
        return _rows(bench)
    finally:
        bench.close()


def _rows(bench: Bench) -> list[Row]:
    """Both sizes in turn; the large one copied as well."""
    small = Ticker(bench, SMALL_BYTES, SMALL_NOISE_MIB)
    large = Ticker(bench, LARGE_BYTES, LARGE_NOISE_MIB)
    took: dict[str, list[float]] = {"small": [], "large": []}
    for _ in range(ROUNDS):
        took["small"].append(small.first_tick_ms("ondemand"))
        took["large"].append(large.first_tick_ms("ondemand"))
    copied = [large.first_tick_ms("copy") for _ in range(COPIES)]
    bench.remove(small.guest, large.guest)
    # The first of each starts the pager, and there is no trace of what it will touch.
    ours = Figure("8 GiB on demand", "ms", tuple(took["large"][1:]))
    peer = Figure("512 MiB on demand", "ms", tuple(took["small"][1:]))
    copy = Figure("8 GiB copied first", "ms", tuple(copied))
    notes = {
        "first_ms": {name: values[0] for name, values in took.items()},
        "phases_small": small.answers[-1].phases_ms,
        "phases_large": [answer.phases_ms for answer in large.answers[ROUNDS - 1 : ROUNDS + 1]],
    }
    return [
        Row("request to the first tick, as memory grows", ours, peer, 1.3, notes),
        Row("request to the first tick, against copying", ours, copy, 1 / 20),
    ]
