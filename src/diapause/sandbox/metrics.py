"""What a home's daemon counted and measured, for Prometheus; the table is in docs/operations.md.

A registry of its own: nothing of the process or the interpreter gets in by itself. Every label has
few values: verbs, steps, outcomes that are codes of errors, states. No id or name is a label.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter as Tally
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from diapause import __version__
from diapause.model import SandboxState, SnapshotState
from diapause.sandbox import residence
from diapause.sandbox.pager_metrics import pager_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from diapause.catalog import Catalog
    from diapause.store.home import Home

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_FROZEN_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 4, 16)
# A home's size is found by a walk over its files: not for each scrape.
_SIZE_FOR_S = 60.0
_FILES_MAX = 200_000


class Metrics:
    """Counters and histograms of one daemon; the rest is read when it is asked for."""

    def __init__(self, home: HomeCollector) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(home)
        self._verbs = Counter(
            "diapause_verbs", "Verbs that ended", ["verb", "outcome"], registry=self.registry
        )
        self._seconds = Histogram(
            "diapause_verb_duration_seconds", "From the beginning of a verb to its end",
            ["verb"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._phases = Histogram(
            "diapause_verb_phase_seconds", "A step of a verb, or a part of one",
            ["verb", "phase"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._frozen = Histogram(
            "diapause_frozen_seconds", "How long a capture held its guest",
            ["verb"], buckets=_FROZEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._captured = Counter(
            "diapause_captured_bytes", "Memory that captures took", registry=self.registry
        )

    def verb_ended(
        self, verb: str, outcome: str, duration_ms: float, phases_ms: dict[str, float]
    ) -> None:
        """One verb came to its end: `done`, or the code of its error."""
        self._verbs.labels(verb, outcome).inc()
        self._seconds.labels(verb).observe(duration_ms / 1e3)
        for phase, ms in phases_ms.items():
            self._phases.labels(verb, phase).observe(ms / 1e3)

    def captured(self, verb: str, frozen_ms: float, captured_bytes: int) -> None:
        """One capture is whole."""
        self._frozen.labels(verb).observe(frozen_ms / 1e3)
        self._captured.inc(captured_bytes)

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)


class HomeCollector:
    """What the catalog and the files say at the moment of a scrape."""

    def __init__(
        self,
        home: Home,
        catalog: Catalog,
        packing: Callable[[], int],
        served: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._home, self._catalog, self._packing = home, catalog, packing
        self._served = served  # what the pager counted; empty where there is none
        self._guard = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._sized_at = -_SIZE_FOR_S

    def collect(self) -> Iterator[Metric]:
        """Every gauge."""
        info = GaugeMetricFamily("diapause_info", "Which Diapause this is", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield _by_state(
            "diapause_sandboxes", "Sandboxes by state", get_args(SandboxState),
            (row.state for row in self._catalog.sandboxes()),
        )  # fmt: skip
        yield _by_state(
            "diapause_snapshots", "Snapshots by state", get_args(SnapshotState),
            (row.state for row in self._catalog.snapshots()),
        )  # fmt: skip
        events = CounterMetricFamily("diapause_events", "Events since the home was made")
        events.add_metric([], self._catalog.journal.last_event())
        yield events
        queue = GaugeMetricFamily("diapause_pack_queue", "Captures that wait to be packed")
        queue.add_metric([], self._packing())
        yield queue
        size = GaugeMetricFamily(
            "diapause_home_bytes", "What the home's files take on the host", labels=["directory"]
        )
        for name, count in sorted(self._home_bytes().items()):
            size.add_metric([name], count)
        yield size
        resident = residence.totals(self._home, self._catalog.sandboxes())
        yield from pager_metrics(self._served(), resident)
        free = GaugeMetricFamily("diapause_home_free_bytes", "What its file system has left")
        free.add_metric([], self._home.free_bytes())
        yield free

    def _home_bytes(self) -> dict[str, int]:
        with self._guard:
            if time.monotonic() - self._sized_at >= _SIZE_FOR_S:
                home = self._home
                self._sizes = {
                    place.name if place.parent == home.root else "buffers": _bytes_below(place)
                    for place in (
                        home.images, home.builds, home.snapshots, home.captures, home.flat,
                        home.sandboxes, home.templates, home.served, home.tmp, home.buffers,
                    )
                }  # fmt: skip
                self._sized_at = time.monotonic()
            return self._sizes


def _by_state(
    name: str, text: str, states: tuple[str, ...], found: Iterable[str]
) -> GaugeMetricFamily:
    """A gauge with every state, also those that nothing is in."""
    counts = Tally(found)
    family = GaugeMetricFamily(name, text, labels=["state"])
    for state in states:
        family.add_metric([state], counts[state])
    return family


def _bytes_below(directory: Path) -> int:
    """Blocks of the files below, each file once; at most so many files are looked at."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            if len(seen) >= _FILES_MAX:
                return total
            try:
                status = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - many of them
            except FileNotFoundError:
                continue
            key = (status.st_dev, status.st_ino)
            if key not in seen:
                seen.add(key)
                total += status.st_blocks * 512
    return total
