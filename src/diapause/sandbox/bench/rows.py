"""Rows of figures: one value a round, the median stands for them, next to a peer of those rounds.

A time alone says little of a machine that does other things besides: what is compared was taken in
turn, in the same rounds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diapause.model import BenchPeer, BenchRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diapause.model import BenchGroup


@dataclass
class Figures:
    """Values by name, in the order in which they first came."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """One more of that name."""
        self.values.setdefault(name, []).append(float(value))

    def __contains__(self, name: str) -> bool:
        return name in self.values


@dataclass(frozen=True)
class Line:
    """A row that is wanted: the figure `of`, in `unit`, perhaps next to the figure `peer`."""

    name: str
    unit: str
    of: str
    peer: str | None = None
    peer_name: str = ""
    notes: tuple[str, ...] = ()


def rows(group: BenchGroup, lines: Sequence[Line], figures: Figures) -> list[BenchRow]:
    """The lines that there are figures of."""
    return [_row(group, line, figures) for line in lines if line.of in figures]


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least so large a part of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(part * 1000) // 1000) - 1)]


def _row(group: BenchGroup, line: Line, figures: Figures) -> BenchRow:
    values = figures.values[line.of]
    row = BenchRow(
        group=group, name=line.name, unit=line.unit, values=values,
        median=statistics.median(values), notes=list(line.notes),
    )  # fmt: skip
    if line.peer is not None and line.peer in figures:
        others = figures.values[line.peer]
        row.peer = BenchPeer(name=line.peer_name, values=others, median=statistics.median(others))
        row.ratio = row.median / row.peer.median if row.peer.median else None
    return row
