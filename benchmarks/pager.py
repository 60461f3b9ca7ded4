"""The pagers: a resume on demand against flat files that are there; faults through userfaultfd
against a bare loop in C; files read from first to last against a bare FUSE server."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.rows import Figure, Row
from diapause.model import ResumeRequest
from diapause.units import KIB, MIB

if TYPE_CHECKING:
    from benchmarks.guest import Bench

ROUNDS = 7
PAIRS = 5
ROOT = Path(__file__).parent.parent
BOUND_S = 600.0


def measure(bench: Bench) -> list[Row]:
    """All rows."""
    return [*_resumes(bench), *_faults(), *_sequential(), *_passed()]


def _resumes(bench: Bench) -> list[Row]:
    """Request to answering agent, builds warm in the page cache, one way and the other in turn."""
    guest = bench.boot()
    bench.fill(guest, 190)
    bench.pause(guest, "disk")
    took: dict[str, list[float]] = {"ondemand": [], "copy": []}
    modes: tuple[Literal["ondemand", "copy"], ...] = ("ondemand", "copy")
    for _ in range(ROUNDS):
        for mode in modes:
            answer = bench.client.resume(guest, ResumeRequest(memory_mode=mode))
            assert answer.memory_mode == mode, answer.notes
            made_ms = answer.phases_ms["materialize"] if mode == "copy" else 0.0
            took[mode].append(answer.ready_ms - made_ms)
            bench.pause(guest, "disk")
    bench.remove(guest)
    ours = Figure("on demand", "ms", tuple(took["ondemand"][1:]))
    peer = Figure("a flat file that is there", "ms", tuple(took["copy"][1:]))
    return [Row("resume on demand to an answering agent", ours, peer, 1.3)]


def _faults() -> list[Row]:
    """The same touches through the server and through the bare loop, in turn."""
    with tempfile.TemporaryDirectory() as place:
        loop = Path(place) / "uffd_loop"
        source = ROOT / "benchmarks" / "peers" / "uffd_loop.c"
        run("cc", "-O2", "-o", str(loop), str(source))
        ours = example("uffd_speed")
        small = [_pair(ours, loop, 4 * KIB, 64 * MIB) for _ in range(PAIRS)]
        large = [_pair(ours, loop, 64 * KIB, 256 * MIB) for _ in range(PAIRS)]
    p50 = [
        Figure(name, "us", tuple(pair[at]["p50_us"] for pair in small))
        for at, name in enumerate(("the server, p50", "a bare loop in C"))
    ]
    # A row's bound is on how much larger ours may be: time per byte, so.
    per_mb = [
        Figure(name, "us/MB", tuple(1e6 / pair[at]["mb_per_s"] for pair in large))
        for at, name in enumerate(("the server", "a bare loop in C"))
    ]
    return [
        Row("a 4 KiB fault through userfaultfd", p50[0], p50[1], 1.25),
        Row("64 KiB a fault through userfaultfd", per_mb[0], per_mb[1], 1 / 0.9),
    ]


def _sequential() -> list[Row]:
    """Files read from first to last through FUSE, builds in the page cache, the ways in turn."""
    with tempfile.TemporaryDirectory() as place:
        bare = Path(place) / "fuse_loop"
        source = ROOT / "benchmarks" / "peers" / "fuse_loop.c"
        run("cc", "-O2", "-pthread", "-o", str(bare), str(source))
        said = run(str(example("fuse_speed")), str(bare)).splitlines()
    took: dict[tuple[str, str], list[float]] = {}
    for line in map(json.loads, said):
        took.setdefault((line["frames"], line["way"]), []).append(1000 / line["mib_per_s"])

    def figure(name: str, frames: str, way: str) -> Figure:
        # A row's bound is on how much larger ours may be: time per byte, so.
        return Figure(name, "ms/MiB", tuple(took[frames, way]))

    raw = figure("the pager", "raw", "pager"), figure("a bare FUSE server", "raw", "bare")
    packed = (
        figure("the pager", "compressed", "pager"),
        figure("zstd on as many threads, no FUSE", "compressed", "zstd"),
    )
    return [
        Row("sequential read, frames as they are", *raw, 1 / 0.9),
        Row("sequential read, compressed frames", *packed, 1 / 0.8),
    ]


def _passed() -> list[Row]:
    """A file that is passed through, against the plain file behind it, in the page cache."""
    took: dict[tuple[str, str], list[float]] = {}
    for line in map(json.loads, run(str(example("passed_speed"))).splitlines()):
        took.setdefault((line["what"], line["way"]), []).append(line["us_per_mib"])

    def figure(called: str, what: str, way: str) -> Figure:
        return Figure(called, "us/MiB", tuple(took[what, way][1:]))  # the first round warms

    def row(name: str, what: str) -> Row:
        ours, peer = figure("passed through", what, "passed"), figure("plain", what, "plain")
        return Row(name, ours, peer, 1.1)

    return [
        row("sequential read of a file that is passed through", "read"),
        row("random touches of a file that is passed through", "touch"),
    ]


def _pair(ours: Path, loop: Path, fault: int, size: int) -> tuple[dict[str, float], ...]:
    return tuple(_touches(program, fault, size) for program in (ours, loop))


def _touches(program: Path, fault: int, size: int) -> dict[str, float]:
    """The line about the touches; another may be about memory."""
    lines = map(json.loads, run(str(program), str(fault), str(size)).splitlines())
    found: dict[str, float] = next(line for line in lines if "p50_us" in line)
    return found


def example(name: str) -> Path:
    """A program of the pager's crate, built as the product is."""
    cargo = shutil.which("cargo") or str(Path.home() / ".cargo/bin/cargo")
    run(cargo, "build", "--release", "--locked", "-q", "-p", "diapause-pager", "--example", name)
    return ROOT / "target" / "release" / "examples" / name


def run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=BOUND_S, cwd=ROOT
    )
    return done.stdout
