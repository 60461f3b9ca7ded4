"""The pager's figures as Prometheus takes them: from its counts, which begin anew with a pager."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

# Every second power of two: 4 us to about 17 s.
_BUCKETS = range(2, 25, 2)


def pager_metrics(said: dict[str, Any], residence: dict[str, int]) -> Iterator[Metric]:
    """All of them; zeros where no pager runs."""
    nothing = {"reads": {}, "stalls": 0, "stored_bytes": 0, "used_bytes": 0}
    totals = said.get("totals", nothing)
    seconds = HistogramMetricFamily(
        "diapause_pager_read_seconds", "Reads that the pager answered, from the kernel's request",
        labels=["source"],
    )  # fmt: skip
    brought = CounterMetricFamily(
        "diapause_pager_read_bytes", "What these reads brought", labels=["source"]
    )
    for source, reads in sorted(totals["reads"].items()):
        seconds.add_metric([source], _buckets(reads["below_us"]), reads["sum_us"] / 1e6)
        brought.add_metric([source], reads["bytes"])
    yield seconds
    yield brought
    for name, what, text in (
        ("stalls", "stalls", "Reads that had to wait for a blob"),
        ("prefetched_bytes", "stored_bytes", "Brought before a guest asked for it"),
        ("prefetch_used_bytes", "used_bytes", "Of that, what a guest was seen to have touched"),
    ):
        counter = CounterMetricFamily(f"diapause_pager_{name}", text)
        counter.add_metric([], totals[what])
        yield counter
    waiting = GaugeMetricFamily("diapause_stalled", "Sandboxes that wait for a blob now")
    waiting.add_metric([], len(said.get("stalled", {})))
    yield waiting
    for what, text in (
        ("resident", "Served files of running guests: what is in memory"),
        ("pending", "Served files of running guests: what an access would ask the pager for"),
    ):
        gauge = GaugeMetricFamily(f"diapause_served_{what}_bytes", text)
        gauge.add_metric([], residence[f"{what}_bytes"])
        yield gauge


def _buckets(below_us: list[int]) -> list[tuple[str, float]]:
    """Prometheus's: each holds all that took no longer."""
    so_far = list(accumulate(below_us))
    found = [(str(2**power / 1e6), float(so_far[power])) for power in _BUCKETS]
    return [*found, ("+Inf", float(so_far[-1]))]
