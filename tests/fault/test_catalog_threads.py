"""The catalog's connections end with their threads, of which a daemon makes and loses many, and
never under one that writes."""

from __future__ import annotations

import threading
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


def test_a_close_waits_for_whoever_writes(home: Home) -> None:
    """Or the write would be cut in its middle, and SQLite with it."""
    catalog, began, closed = Catalog(home.catalog), threading.Event(), threading.Event()

    def write() -> None:
        with catalog.database.transaction() as db:
            began.set()
            closed.wait(0.5)  # a close that does not wait has been by then
            db.execute("INSERT INTO facts VALUES ('a', '1')")

    with ThreadPoolExecutor(1) as threads:
        writes = threads.submit(write)
        assert began.wait(60)
        catalog.close()
        closed.set()
        writes.result(60)
    again = Catalog(home.catalog)
    assert again.fact("a") == "1"
    again.close()
