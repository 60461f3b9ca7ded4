"""A guest that touches 50 MiB in random order as soon as it has been resumed: with the trace of an
earlier resume, without one, and on memory that was copied first. Builds lie on the local disk, out
of the page cache, or behind 20 ms of latency."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.guest import Bench, wait_for
from benchmarks.pager import ROOT, example
from benchmarks.rows import Figure, Row
from diapause.daemon.start import daemon_command
from diapause.model import ResumeRequest

if TYPE_CHECKING:
    from diapause.store.home import Home

ROUNDS = 4
WORKING_SET_MIB = 50
LATENCY_MS = 20
_OUT = "/tmp/touched"
# Longer than the program takes for a clock that was set.
_STANDS_S = 0.5


class Toucher:
    """A paused guest with the program in it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.guest, self.resumes = bench, bench.boot(), 0
        bench.put_program(self.guest, "touch")
        start = f"setsid /tmp/touch {WORKING_SET_MIB} {_OUT} </dev/null >/dev/null 2>&1 &"
        bench.run(self.guest, f"sh -c '{start}'")
        wait_for(lambda: self._lines() == 1, "the guest's memory")
        bench.pause(self.guest, "disk")

    def touched_ms(self, mode: Literal["ondemand", "copy"], *, traced: bool = False) -> float:
        """Resume; what the touches took; paused again afterwards."""
        traces = self.bench.home.traces
        if not traced and traces.exists():
            for path in traces.iterdir():
                path.unlink()
        if mode == "ondemand":
            _drop_caches()
        time.sleep(_STANDS_S)
        answer = self.bench.client.resume(self.guest, ResumeRequest(memory_mode=mode))
        assert answer.memory_mode == mode, answer.notes
        assert traced == bool(answer.prefetched_pages), answer
        self.resumes += 1
        wait_for(lambda: self._lines() > self.resumes, "the touches")
        assert self._lines() == self.resumes + 1, "touched twice: the last were warm"
        last = self.bench.run(self.guest, f"tail -n 1 {_OUT}")
        self.bench.pause(self.guest, "disk")
        return int(last.split()[0]) / 1000

    def _lines(self) -> int:
        return int(self.bench.run(self.guest, f"wc -l <{_OUT} 2>/dev/null || echo 0"))


def measure(bench: Bench) -> list[Row]:
    """The rows of the local disk."""
    return _rows(bench, "from the local disk")


def measure_remote(_bench: Bench) -> list[Row]:
    """The rows of a source with latency, in a home of its own."""
    with contextlib.ExitStack() as ends:

        def command(home: Home) -> list[str]:
            """A daemon whose pager fetches builds from a server of the home's own directory."""
            server = subprocess.Popen(
                [str(program), str(home.builds), str(LATENCY_MS)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            ends.callback(_end, server)
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            words = daemon_command(home)
            there = words.index("-m")
            module = ["-m", "benchmarks.remote_daemon", url]
            return ["env", f"PYTHONPATH={ROOT}", *words[:there], *module, *words[there + 2 :]]

        program = example("blob_server")
        bench = Bench(command)
        try:
            return _rows(bench, f"from a source with {LATENCY_MS} ms of latency")
        finally:
            bench.close()


def _end(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.communicate()


def _rows(bench: Bench, where: str) -> list[Row]:
    guest = Toucher(bench)
    took: dict[str, list[float]] = {"without": [], "traced": [], "copied": []}
    for _ in range(ROUNDS):
        took["without"].append(guest.touched_ms("ondemand"))
        took["traced"].append(guest.touched_ms("ondemand", traced=True))
        took["copied"].append(guest.touched_ms("copy"))
    bench.remove(guest.guest)
    figures = {name: Figure(name, "ms", tuple(values)) for name, values in took.items()}
    what = f"{WORKING_SET_MIB} MiB touched at random after a resume"
    return [
        Row(f"{what} {where}, with a trace", figures["traced"], figures["without"], 1 / 3),
        Row(f"{what} {where}, against copied memory", figures["traced"], figures["copied"], 1.5),
    ]


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
