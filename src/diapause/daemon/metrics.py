"""`/metrics`: what the engine counted, and what the daemon itself knows beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import generate_latest
from starlette.responses import Response

from diapause.daemon.log import dropped_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

# Of the text format that every Prometheus reads.
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Daemon:
    def collect(self) -> Iterator[Metric]:
        """Lines that the log could not take."""
        drops = CounterMetricFamily("diapause_log_dropped_lines", "Log lines that were dropped")
        drops.add_metric([], dropped_lines())
        yield drops


_registry = CollectorRegistry()
_registry.register(_Daemon())


def metrics_response(of_engine: bytes) -> Response:
    """The engine's text and ours."""
    return Response(metrics_text(of_engine), headers={"Content-Type": MEDIA_TYPE})


def metrics_text(of_engine: bytes) -> bytes:
    """One text: the two have no name in common."""
    return of_engine + generate_latest(_registry)
