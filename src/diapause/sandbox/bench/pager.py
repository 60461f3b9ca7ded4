"""`bench pager`: what memory on demand does for a guest that has memory in use.

The guest reads a part of what it has as soon as it has been resumed: on demand without a trace, on
demand with the trace of that, and on memory that was copied first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diapause.sandbox.bench.files import Files
from diapause.sandbox.bench.guest import Subject, apart, timed_ms
from diapause.sandbox.bench.rows import Figures, Line, rows
from diapause.units import MIB, format_size

if TYPE_CHECKING:
    from diapause.model import BenchRow
    from diapause.sandbox.engine import Engine

_MEMORY_BYTES = 384 * MIB
_FILL_MIB, _WORK_MIB = 128, 32
_FILL = f"dd if=/dev/urandom of=/tmp/fill bs=1M count={_FILL_MIB} 2>/dev/null"
_WORK = f"dd if=/tmp/fill of=/dev/null bs=1M count={_WORK_MIB} 2>/dev/null"
_FLAT = "copied from a flat file that is there"
_WITHOUT = "without a trace"
_ORIGINS = {
    "local": "builds on this host", "kept": "frames that are kept decoded", "zero": "no data",
    "capture": "a capture", "remote": "builds elsewhere",
}  # fmt: skip
_WORDS = f"{_WORK_MIB} MiB read by the guest right after"
_COLD = ("the served file out of the page cache, its builds and the flat file in it",)
_FLAT_CACHED = "a flat file in the page cache"


def measure(trial: Engine, rounds: int) -> tuple[list[BenchRow], list[str]]:
    """All rows, and what there is to say; raises PagerUnavailable."""
    figures = Figures()
    with apart("pager: filling a guest's memory"):
        trial.host.ondemand.pager.pair(start=True)
        guest = Subject.boot(trial, _MEMORY_BYTES)
        guest.sh(_FILL)
        guest.pause()
    for number in range(1, rounds + 1):
        with apart(f"pager: round {number} of {rounds}"):
            _without(trial, guest, figures)
            _traced(trial, guest, figures)
            _copied(guest, figures)
            files = _files(trial, guest)
            if number == 1:
                compared = files.compare()
            files.measure(figures, number)
            _passed(trial, guest, figures)
    guest.remove()
    notes = [f"pager: {format_size(compared)} of a served file are what the flat file has"]
    return rows("pager", [*_LINES, *_read_lines(figures), *_FILE_LINES], figures), notes


def _without(trial: Engine, guest: Subject, figures: Figures) -> None:
    trial.host.ondemand.traces.forget(
        [row.id for row in trial.host.catalog.snapshots(removed=True)]
    )
    figures.add("ready without", guest.resume("ondemand").ready_ms)
    figures.add("work without", timed_ms(lambda: guest.sh(_WORK)))
    _served(trial, guest, figures, "without")
    guest.pause()


def _traced(trial: Engine, guest: Subject, figures: Figures) -> None:
    figures.add("ready traced", guest.resume("ondemand").ready_ms)
    figures.add("work traced", timed_ms(lambda: guest.sh(_WORK)))
    _served(trial, guest, figures, "traced")
    guest.pause()


def _copied(guest: Subject, figures: Figures) -> None:
    figures.add("ready copied", guest.resume("copy").ready_ms)
    figures.add("work copied", timed_ms(lambda: guest.sh(_WORK)))
    guest.pause()


def _passed(trial: Engine, guest: Subject, figures: Figures) -> None:
    """With a flat file behind the served one, where this host passes it through.

    It leaves another snapshot to the next round: of this one's file much was read, and counted.
    """
    ready_ms = guest.resume("passed").ready_ms
    if any(file.get("passthrough") for file in _memory(trial, guest)):
        figures.add("ready passed", ready_ms)
        figures.add("work passed", timed_ms(lambda: guest.sh(_WORK)))
    guest.pause()
    guest.forget_older()


def _memory(trial: Engine, guest: Subject) -> list[dict[str, Any]]:
    """What `inspect` has of the guest's served memory."""
    files = (trial.inspect(guest.sandbox).served or {}).get("files", [])
    return [file for file in files if file["name"].endswith(".memory")]


def _served(trial: Engine, guest: Subject, figures: Figures, how: str) -> None:
    """What the pager itself counted of the guest's memory until now, as `inspect` has it."""
    for file in _memory(trial, guest):
        for origin, reads in file["seen"]["reads"].items():
            if reads["count"]:
                for what in ("count", "p50_us", "p99_us"):
                    figures.add(f"{what} {origin} {how}", reads[what])
    prefetch = (trial.inspect(guest.sandbox).served or {}).get("prefetch")
    if how == "traced" and prefetch and not prefetch["late"]:
        figures.add("brought", prefetch["prefetched_pages"])
        figures.add("used", prefetch["used_pages"])


def _files(trial: Engine, guest: Subject) -> Files:
    record, ondemand = guest.snapshot(), trial.host.ondemand
    ondemand.make_ready(record, whole=False)
    name = f"{record.id}.memory"
    return Files(name, ondemand.pager.path(name), trial.host.flats.ensure(record).files["memory"])


_LINES = (
    Line("resume on demand, without a trace", "ms", "ready without", "ready copied", _FLAT),
    Line("resume on demand, with a trace", "ms", "ready traced", "ready copied", _FLAT),
    Line("resume on demand, passed through", "ms", "ready passed", "ready copied", _FLAT),
    Line(f"{_WORDS}, without a trace", "ms", "work without", "work copied", "on copied memory"),
    Line(f"{_WORDS}, with a trace", "ms", "work traced", "work without", _WITHOUT),
    Line(f"{_WORDS}, with a trace", "ms", "work traced", "work copied", "on copied memory"),
    Line(f"{_WORDS}, passed through", "ms", "work passed", "work copied", "on copied memory"),
    Line("brought ahead of the guest", "pages", "brought"),
    Line("and touched by it", "pages", "used", "brought", "brought ahead"),
)


def _read_lines(figures: Figures) -> list[Line]:
    """What the pager counted, by where the bytes came from."""
    found = []
    for origin, words in _ORIGINS.items():
        for how, said in (("without", _WITHOUT), ("traced", "with a trace")):
            of, peer = f"{origin} {how}", f"{origin} without" if how == "traced" else None
            name = f"reads from {words}, {said}"
            for what, unit, suffix in (
                ("count", "reads", ""), ("p50_us", "us", ", p50"), ("p99_us", "us", ", p99")
            ):  # fmt: skip
                other = f"{what} {peer}" if peer else None
                found.append(Line(name + suffix, unit, f"{what} {of}", other, _WITHOUT))
    return found


_FILE_LINES = (
    *(
        Line(
            f"a {size} KiB fault at random on the served file, p{part * 100:.0f}", "us",
            f"{size} served {part}", f"{size} flat {part}", _FLAT_CACHED, _COLD,
        )
        for size in (4, 64)
        for part in (0.5, 0.99)
    ),
    Line(
        "the served file read from first to last", "MiB/s", "read served", "read flat",
        _FLAT_CACHED, _COLD,
    ),
)  # fmt: skip
