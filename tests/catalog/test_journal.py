"""Events, kept requests and old operations: numbered, bounded, whole across threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diapause import journal
from diapause.catalog import Catalog
from diapause.journal import Journal
from diapause.limits import EVENT_DETAIL_BYTES_MAX


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    made = Catalog(tmp_path / "catalog.sqlite3")
    yield made
    made.close()


@pytest.fixture
def kept(catalog: Catalog) -> Journal:
    return catalog.journal


def test_events_are_numbered_and_read_in_pages(kept: Journal) -> None:
    made = [kept.event("paused", sandbox="a" * 16, detail={"n": n}) for n in range(5)]
    assert [event.sequence for event in made] == [1, 2, 3, 4, 5]
    assert kept.events() == made
    assert kept.events(after=2, limit=2) == made[2:4]
    assert kept.events(after=5) == []
    assert kept.last_event() == 5


def test_no_number_is_given_twice(kept: Journal) -> None:
    """From many threads, and after the newest was dropped."""
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: kept.event("e", detail={"n": n}), range(80)))
    assert sorted(event.sequence for event in made) == list(range(1, 81))
    with kept._database.transaction() as db:
        db.execute("DELETE FROM events")
    assert kept.event("e").sequence == 81


def test_the_oldest_events_go(kept: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVENTS_MAX", 10)
    for n in range(200):
        kept.event("e", detail={"n": n})
    found = kept.events()
    assert 10 <= len(found) < 10 + 64
    assert found[-1].detail == {"n": 199}


def test_a_detail_that_is_too_large_is_left_out(kept: Journal) -> None:
    event = kept.event("e", detail={"text": "x" * EVENT_DETAIL_BYTES_MAX})
    assert event.detail["left_out_bytes"] > EVENT_DETAIL_BYTES_MAX
    assert kept.events() == [event]


def test_a_key_stands_for_one_request(kept: Journal) -> None:
    """However many threads bring it at once."""
    with ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda n: kept.keep_request("key", "d", f"op{n}", "boot"), range(16))
        )
    assert found.count(None) == 1
    first = kept.kept_request("key")
    assert first is not None
    assert all(other is None or other == first for other in found)
    kept.answer_request("key", "another operation", b"no")
    assert [row.key for row in kept.open_requests()] == ["key"]
    kept.answer_request("key", first.operation, b"{}")
    assert kept.open_requests() == []
    again = kept.keep_request("key", "d", "late", "boot")
    assert again is not None
    assert (again.answer, again.operation) == (b"{}", first.operation)


def test_a_request_that_came_to_nothing_is_forgotten(kept: Journal) -> None:
    kept.keep_request("key", "d", "op", "boot")
    kept.forget_request("key", "another operation")
    assert kept.kept_request("key") is not None
    kept.forget_request("key", "op")
    assert kept.keep_request("key", "d", "op2", "boot") is None


def test_old_requests_go_but_never_open_ones(
    kept: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "IDEMPOTENCY_KEYS_MAX", 4)
    kept.keep_request("open", "d", "op", "boot")
    for n in range(20):
        kept.keep_request(f"key{n}", "d", f"op{n}", "boot")
        kept.answer_request(f"key{n}", f"op{n}", b"{}")
    assert [kept.kept_request(key) is not None for key in ("open", "key0", "key19")] == [
        True, False, True,
    ]  # fmt: skip
    monkeypatch.setattr(journal, "IDEMPOTENCY_S", -1.0)
    kept.keep_request("last", "d", "op", "boot")
    assert kept.kept_request("key19") is None
    assert kept.kept_request("open") is not None


def test_closed_operations_are_bounded(kept: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their steps; an open one stays."""
    monkeypatch.setattr(journal, "OPERATIONS_KEPT_MAX", 10)
    kept.begin("open", "run", "s", None, "boot")
    kept.step("open", 0, "files")
    for n in range(200):
        kept.begin(f"op{n:03}", "save", "s", None, "boot", request="asked")
        kept.step(f"op{n:03}", 0, "prepare")
        kept.end(f"op{n:03}", "done")
    found = kept.operations_of("asked")
    assert 10 <= len(found) < 10 + 64
    assert found[-1].id == "op199"
    assert (found[-1].outcome, found[-1].steps) == ("done", ["prepare"])
    assert [operation.steps for operation in kept.open_operations("s")] == [["files"]]
    with kept._database.transaction() as db:
        assert db.execute("SELECT count(*) FROM steps").fetchone()[0] == len(found) + 1
