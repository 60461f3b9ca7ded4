"""`bench cycle`: boot, save, pause, resume and fork of a guest that writes between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diapause.model import ForkRequest
from diapause.sandbox.bench.guest import Subject, apart, timed_ms
from diapause.sandbox.bench.rows import Figures, Line, rows
from diapause.units import MIB

if TYPE_CHECKING:
    from diapause.model import BenchRow, CaptureAnswer
    from diapause.sandbox.engine import Engine

_MEMORY_BYTES = 256 * MIB
# About 1,500 pages of the guest's tmpfs, in place, and what its kernel writes besides.
_WRITES = "dd if=/dev/urandom of=/tmp/round bs=64k count=95 conv=notrunc 2>/dev/null"
_BOOT = "booting the same image"
_LINES = (
    Line("boot to an answering agent", "ms", "boot"),
    Line("frozen by a save", "ms", "save frozen", "save", "the whole save"),
    Line("pages that a save captures", "pages", "save pages"),
    Line("frozen by a pause", "ms", "pause frozen", "pause", "the whole pause"),
    Line("pages that a pause captures", "pages", "pause pages"),
    Line("resume, copied from a flat file that is there", "ms", "copy", "boot", _BOOT),
    Line("resume on demand", "ms", "ondemand", "boot", _BOOT),
    Line("resume on demand", "ms", "ondemand", "copy", "copied from a flat file"),
    Line("fork of a snapshot", "ms", "fork", "boot", _BOOT),
)


def measure(trial: Engine, rounds: int, *, ondemand: bool) -> list[BenchRow]:
    """All rows; without those on demand where that can't be done here."""
    figures = Figures()
    with apart("cycle: booting a guest"):
        guest = Subject.boot(trial, _MEMORY_BYTES)
        guest.sh(_WRITES)
        guest.save()  # all that the guest wrote since it was booted, once
    for number in range(1, rounds + 1):
        with apart(f"cycle: round {number} of {rounds}"):
            _round(trial, guest, figures, ondemand)
    guest.remove()
    return rows("cycle", _LINES, figures)


def _round(trial: Engine, guest: Subject, figures: Figures, ondemand: bool) -> None:
    beside = Subject.boot(trial, _MEMORY_BYTES)
    figures.add("boot", beside.ran.ready_ms)
    beside.remove()
    guest.sh(_WRITES)
    _captured(figures, "save", guest.save())
    guest.sh(_WRITES)
    _captured(figures, "pause", guest.pause())
    figures.add("copy", guest.resume("copy").ready_ms)
    if ondemand:
        guest.pause()
        figures.add("ondemand", guest.resume("ondemand").ready_ms)
    snapshot = guest.pause().snapshot
    forks: list[str] = []
    request = ForkRequest(source=snapshot)
    figures.add("fork", timed_ms(lambda: forks.extend(trial.fork(request).sandboxes)))
    trial.remove(forks, force=True)
    guest.resume("copy")
    guest.forget_older()


def _captured(figures: Figures, verb: str, answer: CaptureAnswer) -> None:
    figures.add(f"{verb} frozen", answer.frozen_ms)
    figures.add(f"{verb} pages", answer.dirty_pages)
    figures.add(verb, answer.phases_ms["total"])
