"""The catalog's connections end with their threads: a daemon makes and loses many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diapause.catalog import Catalog
from diapause.store.home import Home


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_threads_that_ended_hold_no_descriptors(home: Home) -> None:
    """Each fork of many has threads of its own."""
    catalog = Catalog(home.catalog)
    before = _descriptors()
    for _ in range(20):
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda number: catalog.remember("a", str(number)), range(4)))
    assert _descriptors() <= before + 8
    assert catalog.fact("a") is not None
    catalog.close()
