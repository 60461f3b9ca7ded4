"""`/metrics`: read with Prometheus's own parser, few values a label."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diapause.catalog import Catalog, SandboxRecord
from diapause.sandbox.metrics import HomeCollector, Metrics
from diapause.store.home import Home
from tests.framework.fake_home import FakeHome


@pytest.fixture
def catalog(home: Home) -> Iterator[Catalog]:
    with contextlib.closing(Catalog(home.catalog)) as made:
        yield made


def sample(text: str, name: str, **labels: str) -> float:
    """The value of one sample."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


def row(sandbox: str, state: str) -> SandboxRecord:
    return SandboxRecord(
        id=sandbox, name=None, state=state, created_at="2026-01-01T00:00:00Z", image="tiny",
        memory_bytes=1, cpus=1, disks_bytes=[], hostname="x", machine_id="x",
    )  # fmt: skip


def test_the_daemon_answers_as_prometheus_reads_it(place: FakeHome) -> None:
    text = place.client.metrics()
    assert sample(text, "fake") == 1
    assert sample(text, "diapause_log_dropped_lines_total") == 0


def test_verbs_phases_and_captures_are_counted(home: Home, catalog: Catalog) -> None:
    metrics = Metrics(HomeCollector(home, catalog, lambda: 3))
    metrics.verb_ended("pause", "done", 120.0, {"freeze": 4.0, "keep": 100.0})
    metrics.verb_ended("pause", "vmm_failed", 20.0, {})
    metrics.captured("pause", 3.0, 8192)
    text = metrics.text().decode()
    assert sample(text, "diapause_verbs_total", verb="pause", outcome="done") == 1
    assert sample(text, "diapause_verbs_total", verb="pause", outcome="vmm_failed") == 1
    assert sample(text, "diapause_verb_duration_seconds_count", verb="pause") == 2
    assert sample(text, "diapause_verb_duration_seconds_sum", verb="pause") == pytest.approx(0.14)
    name = "diapause_verb_phase_seconds_sum"
    assert sample(text, name, verb="pause", phase="keep") == pytest.approx(0.1)
    assert sample(text, "diapause_frozen_seconds_bucket", verb="pause", le="0.002") == 0
    assert sample(text, "diapause_frozen_seconds_bucket", verb="pause", le="0.004") == 1
    assert sample(text, "diapause_captured_bytes_total") == 8192
    assert sample(text, "diapause_pack_queue") == 3


def test_states_and_bytes_are_those_of_the_moment(home: Home, catalog: Catalog) -> None:
    metrics = Metrics(HomeCollector(home, catalog, lambda: 0))
    (home.builds / "one").write_bytes(b"x" * 8192)
    (home.builds / "again").hardlink_to(home.builds / "one")
    catalog.put_sandbox(row("aa", "running"))
    catalog.put_sandbox(row("bb", "running"))
    catalog.put_sandbox(row("cc", "failed"))
    text = metrics.text().decode()
    assert sample(text, "diapause_sandboxes", state="running") == 2
    assert sample(text, "diapause_sandboxes", state="failed") == 1
    assert sample(text, "diapause_sandboxes", state="paused") == 0
    assert sample(text, "diapause_snapshots", state="packed") == 0
    assert sample(text, "diapause_home_bytes", directory="builds") == 8192
    assert sample(text, "diapause_home_bytes", directory="buffers") == 0
    assert sample(text, "diapause_home_free_bytes") > 0
    catalog.put_sandbox(row("aa", "paused"))
    assert sample(metrics.text().decode(), "diapause_sandboxes", state="paused") == 1


def test_the_pager_s_counts_are_prometheus_s(home: Home, catalog: Catalog) -> None:
    """Its latencies by powers of two as cumulative buckets; what waits right now."""
    below = [0] * 32
    below[3], below[11] = 5, 2  # below 8 us, and below 2,048 us
    local = {"count": 7, "bytes": 7 * 131072, "sum_us": 3000, "below_us": below}
    none = {"count": 0, "bytes": 0, "sum_us": 0, "below_us": [0] * 32}
    said = {
        "totals": {
            "reads": {"local": local, "zero": none},
            "stalls": 3,
            "stored_bytes": 1 << 20,
            "used_bytes": 1 << 19,
        },
        "stalled": {"feedface": {"blob": "builds/beef", "cause": "gone", "waited_ms": 10}},
    }
    text = Metrics(HomeCollector(home, catalog, lambda: 0, lambda: said)).text().decode()
    name = "diapause_pager_read_seconds"
    assert sample(text, f"{name}_count", source="local") == 7
    assert sample(text, f"{name}_sum", source="local") == pytest.approx(0.003)
    assert sample(text, f"{name}_bucket", source="local", le="4e-06") == 0
    assert sample(text, f"{name}_bucket", source="local", le="1.6e-05") == 5
    assert sample(text, f"{name}_bucket", source="local", le="0.004096") == 7
    assert sample(text, f"{name}_count", source="zero") == 0
    assert sample(text, "diapause_pager_read_bytes_total", source="local") == 7 * 131072
    assert sample(text, "diapause_pager_stalls_total") == 3
    assert sample(text, "diapause_pager_prefetched_bytes_total") == 1 << 20
    assert sample(text, "diapause_pager_prefetch_used_bytes_total") == 1 << 19
    assert sample(text, "diapause_stalled") == 1
    assert not {"feedface", "beef"} & set(text.replace('"', " ").split())


def test_without_a_pager_nothing_waits(home: Home, catalog: Catalog) -> None:
    text = Metrics(HomeCollector(home, catalog, lambda: 0)).text().decode()
    for name in (
        "stalled", "pager_stalls_total", "served_resident_bytes", "served_pending_bytes",
        "pager_prefetched_bytes_total", "pager_prefetch_used_bytes_total",
    ):  # fmt: skip
        assert sample(text, f"diapause_{name}") == 0


def test_no_id_is_a_label(home: Home, catalog: Catalog) -> None:
    metrics = Metrics(HomeCollector(home, catalog, lambda: 0))
    catalog.put_sandbox(row("feedfacefeedface", "running"))
    assert b"feedface" not in metrics.text()
