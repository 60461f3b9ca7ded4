"""Rows: a figure, its peer, and the bound that the ratio of the two has to keep.

A speed alone says nothing on a noisy machine; every row is therefore a ratio of two figures that
were taken in the same run. Rows are printed as one table and written as JSON lines.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NO_BOUND = float("inf")  # for information


@dataclass(frozen=True)
class Figure:
    """Repeated measurements of one thing; the median stands for it."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def text(self) -> str:
        """Median, and the range where there is one."""
        spread = f" ({min(self.values):.4g}-{max(self.values):.4g})" if len(self.values) > 1 else ""
        return f"{self.median:.4g} {self.unit}{spread}"


@dataclass(frozen=True)
class Row:
    """One line of the report: `ours / peer` must be at most `ratio_max`."""

    name: str
    ours: Figure
    peer: Figure
    ratio_max: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Ours over the peer's."""
        return self.ours.median / self.peer.median if self.peer.median else float("inf")

    @property
    def kept(self) -> bool:
        """Whether the bound is kept."""
        return self.ratio <= self.ratio_max

    def as_json(self) -> str:
        """The row as one JSON line, values and all."""
        known = {"ratio": self.ratio, "kept": self.kept}
        bound = None if self.ratio_max == NO_BOUND else self.ratio_max
        return json.dumps({**asdict(self), "ratio_max": bound, **known}, default=str)


def bound_text(ratio_max: float) -> str:
    """How a bound is written: a small one as how many times less."""
    if ratio_max == NO_BOUND:
        return "none"
    return f"<= 1/{1 / ratio_max:.3g}" if ratio_max < 1 else f"<= {ratio_max:.3g}"


def report(rows: list[Row], directory: Path) -> None:
    """Print the table, and write the rows to `directory`/results.jsonl."""
    table = Table("what", "ours", "peer", "ratio", "bound", "")
    for row in rows:
        ratio = f"1/{1 / row.ratio:.3g}" if 0 < row.ratio < 1 else f"{row.ratio:.3g}"
        peer = f"{row.peer.name}: {row.peer.text()}"
        bound = bound_text(row.ratio_max)
        table.add_row(row.name, row.ours.text(), peer, ratio, bound, "" if row.kept else "MISSED")
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(row.as_json() + "\n" for row in rows)
    (directory / "results.jsonl").write_text(lines)
    sys.stdout.write(lines)
