"""`make bench`: every figure, or those that are named; exits 1 where a bound is missed.

python -m benchmarks [NAME...]      names: frozen saves disk memory stored resume warm forks pager
                                    ticks touches touches-remote at-once holders cli many check
                                    adopt
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import (
    at_once,
    command_line,
    frozen,
    many,
    pager,
    resume,
    saves,
    ticks,
    touches,
)
from benchmarks.guest import Bench
from benchmarks.rows import Row, report

if TYPE_CHECKING:
    from collections.abc import Callable

MEASURES: dict[str, Callable[[Bench], list[Row]]] = {
    "frozen": frozen.measure,
    "saves": saves.twenty_saves,
    "disk": saves.large_disk,
    "memory": saves.large_memory,
    "stored": saves.stored_bytes,
    "resume": resume.resumes,
    "warm": resume.warm,
    "forks": resume.forks,
    "pager": pager.measure,
    "ticks": ticks.measure,
    "touches": touches.measure,
    "touches-remote": touches.measure_remote,
    "at-once": at_once.forks,
    "holders": at_once.holders,
    "cli": command_line.measure,
    "many": many.many,
    "check": many.check,
    "adopt": many.adopt,
}


def main(names: list[str]) -> int:
    """Measure what is named, or all of it."""
    if unknown := [name for name in names if name not in MEASURES]:
        sys.stderr.write(f"unknown: {unknown}; there are {', '.join(MEASURES)}\n")
        return 2
    bench = Bench()
    rows: list[Row] = []
    try:
        for name in names or MEASURES:
            began = time.monotonic()
            rows += MEASURES[name](bench)
            sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s\n")
        report(rows, Path(__file__).parent / "results")
    finally:
        bench.close()
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
