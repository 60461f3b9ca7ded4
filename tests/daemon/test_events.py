"""Events: told with the change of a row or not at all, numbered, followed over a restart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from diapause.catalog import Catalog, Identity, SandboxRecord, SnapshotRecord
from diapause.errors import NameInUse
from diapause.events import KINDS
from diapause.model import Event
from diapause.operation import Operation, under
from diapause.store.home import Home
from tests.framework import sources
from tests.framework.fake_home import FakeHome, eventually, gone

AT = "2026-01-01T00:00:00Z"


@pytest.fixture
def catalog(home: Home) -> Iterator[Catalog]:
    with contextlib.closing(Catalog(home.catalog)) as made:
        yield made


def sandbox(state: str, **more: Any) -> SandboxRecord:
    return SandboxRecord(
        **{
            "id": "ab", "name": "web", "state": state, "created_at": AT, "image": "tiny",
            "memory_bytes": 1, "cpus": 1, "disks_bytes": [], "hostname": "x", "machine_id": "x",
            **more,
        }
    )  # fmt: skip


def snapshot(state: str, **more: Any) -> SnapshotRecord:
    return SnapshotRecord(
        **{
            "id": "5a", "name": None, "sandbox": "ab", "parent": None, "state": state,
            "durability": "disk", "created_at": AT, "boot_id": "b", "image": "tiny",
            "identity": Identity("qemu", "7.2", "q35", "max", "tcg"), "layout": 1,
            "command_line": [], "memory_bytes": 1, "cpus": 1, "disks_bytes": [], "hostname": "x",
            "machine_id": "x", "agent": True, "dirty_source": "private", "dirty_pages": 7,
            "frozen_ms": 1.5, "state_bytes": 1, "state_digest": "", "devices": [], **more,
        }
    )  # fmt: skip


def kinds(catalog: Catalog) -> list[str]:
    return [event.kind for event in catalog.journal.events()]


def test_a_life_is_told_once_each(catalog: Catalog) -> None:
    for state in (
        "creating", "creating", "running", "running", "pausing", "paused", "resuming", "running",
        "frozen", "running", "failed", "removing", "removed", "removed",
    ):  # fmt: skip
        catalog.put_sandbox(sandbox(state))
    assert kinds(catalog) == [
        "created", "running", "paused", "resumed", "frozen", "thawed", "failed", "removed",
    ]  # fmt: skip


def test_what_did_not_happen_is_not_told(catalog: Catalog) -> None:
    """A pause that failed, a resume that failed: the sandbox is what it was."""
    for state in ("creating", "running", "pausing", "running", "paused", "resuming", "paused"):
        catalog.put_sandbox(sandbox(state))
    assert kinds(catalog) == ["created", "running", "paused"]


def test_a_fork_names_its_source_and_a_failure_its_cause(catalog: Catalog) -> None:
    catalog.put_sandbox(sandbox("creating", snapshot="5a"))
    error = {"code": "vmm_failed", "message": "gone", "fields": {"console": "a secret"}}
    catalog.put_sandbox(sandbox("failed", reason="the VMM has ended", error=error))
    forked, failed = catalog.journal.events()
    assert (forked.kind, forked.snapshot) == ("forked", "5a")
    assert failed.detail == {
        "name": "web", "reason": "the VMM has ended", "code": "vmm_failed", "message": "gone",
    }  # fmt: skip


def test_snapshots_are_saved_packed_or_lost(catalog: Catalog) -> None:
    catalog.put_snapshot(snapshot("captured"), durable=False, sandbox=sandbox("running"))
    catalog.put_snapshot(snapshot("captured", error={"code": "x", "message": "y"}), durable=False)
    catalog.put_snapshot(snapshot("packed"), durable=False)
    catalog.put_snapshot(snapshot("failed", error={"code": "snapshot_lost"}), durable=False)
    catalog.put_snapshot(snapshot("captured", id="5b"), durable=False, sandbox=sandbox("pausing"))
    found = [(e.kind, e.snapshot) for e in catalog.journal.events() if e.snapshot]
    assert found == [
        ("saved", "5a"), ("pack_failed", "5a"), ("packed", "5a"), ("snapshot_failed", "5a"),
    ]  # fmt: skip


def test_a_snapshot_is_removed_once(catalog: Catalog) -> None:
    catalog.put_snapshot(snapshot("packed", name="before"), durable=False)
    for day in (1, 2):
        removed_at = f"2026-01-0{day}T00:00:00Z"
        change = partial(replace, name=None, removed_at=removed_at)
        catalog.change_snapshot("5a", change, durable=False)
    told = [(event.kind, event.detail) for event in catalog.journal.events()]
    assert told[1:] == [("snapshot_removed", {"name": "before"})]


def test_an_event_has_the_id_of_what_a_client_asked_for(catalog: Catalog) -> None:
    asked = Operation("run")
    with under(asked):
        catalog.put_sandbox(sandbox("creating"))
    catalog.put_sandbox(sandbox("running"))
    assert [event.operation for event in catalog.journal.events()] == [asked.id, None]


def test_a_row_that_is_not_written_tells_nothing(catalog: Catalog) -> None:
    catalog.put_sandbox(sandbox("creating"))
    with pytest.raises(NameInUse):
        catalog.put_sandbox(sandbox("creating", id="cd"))
    assert [event.sandbox for event in catalog.journal.events()] == ["ab"]


def test_the_kinds_are_those_of_the_document() -> None:
    text = (sources.ROOT / "docs/operations.md").read_text()
    missing = [kind for kind in KINDS if f"`{kind}`" not in text]
    assert missing == []


# -- at the API and on the command line ------------------------------------------------------------


def test_events_are_listed_after_a_number(place: FakeHome) -> None:
    assert [event["sequence"] for event in place.json("events")] == [1, 2, 3]
    assert [event["sequence"] for event in place.json("events", "--after", "2")] == [3]
    assert place.json("events", "--after", "3") == []
    out = place.run("events").stdout.decode()
    assert out.splitlines()[0].split("  ")[:3] == ["1", AT, "created"]
    assert "\x1b" not in out


def test_more_events_than_one_piece_all_come(place: FakeHome) -> None:
    place.home.create()
    _happened(place, "1234")
    assert [event.sequence for event in place.client.events()] == list(range(1, 1235))


@contextlib.contextmanager
def following(place: FakeHome) -> Iterator[Callable[[], int]]:
    """Follow the events with the program; what gives the number of the next one."""
    process = place.spawn("events", "-f", "--json")
    assert process.stdout is not None

    def next_number() -> int:
        assert process.stdout is not None
        return msgspec.json.decode(process.stdout.readline(), type=Event).sequence

    try:
        yield next_number
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.communicate()


def end_daemon(place: FakeHome) -> None:
    pid = place.daemon_pid
    os.kill(pid, signal.SIGKILL)
    eventually("the end of the daemon", lambda: gone(pid))


def test_following_goes_on_over_a_restart_of_the_daemon(place: FakeHome) -> None:
    place.client.sandboxes()
    with following(place) as next_number:
        assert [next_number() for _ in range(3)] == [1, 2, 3]
        _happened(place, "4")
        assert next_number() == 4
        end_daemon(place)
        _happened(place, "5")
        place.client.sandboxes()
        assert next_number() == 5


def test_following_goes_on_when_the_daemon_ends_while_it_tells_what_was(place: FakeHome) -> None:
    """The events that were there already come in an answer of their own: it may break off too."""
    place.client.sandboxes()
    (place.home.root / "stall").touch()  # after the first three
    with following(place) as next_number:
        assert [next_number() for _ in range(3)] == [1, 2, 3]
        eventually("the next look", (place.home.root / "stalled").exists)
        end_daemon(place)
        _happened(place, "4")
        (place.home.root / "stall").unlink()
        place.client.sandboxes()
        assert next_number() == 4


def test_following_starts_a_daemon_once_and_says_why_there_is_none(place: FakeHome) -> None:
    place.home.create()
    (place.home.root / "newer").touch()
    done = place.run("events", "-f")
    assert done.returncode == 61, done


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "99999999999999999", "", "٣"])
def test_a_number_that_is_none_is_refused(place: FakeHome, after: str) -> None:
    from urllib.parse import quote

    from tests.daemon.test_daemon_api import ask

    status, _, answer = ask(place, "GET", f"/v1/events?after={quote(after)}")
    assert (status, answer["error"]["code"]) == (400, "invalid_request"), json.dumps(answer)


def _happened(place: FakeHome, number: str) -> None:
    """So many events there are now; whole at once: the engine may read the file at any moment."""
    fresh = place.home.root / "events.new"
    fresh.write_text(number)
    fresh.rename(place.home.root / "events")
