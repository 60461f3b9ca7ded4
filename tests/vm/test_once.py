"""A request under an idempotency key, with the daemon killed in it: never none, never two."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from diapause.daemon.start import connect, daemon_command
from diapause.guest.images import Image
from diapause.model import GcRequest
from tests.framework.catalog_tap import Place, Tap, at_end, before_step
from tests.framework.sandbox import (
    DISK_BYTES,
    MEMORY_BYTES,
    WAIT_S,
    Aside,
    Daemon,
    Sandbox,
    real_home,
)

pytestmark = pytest.mark.vm

RUN = {"name": "made", "memory_bytes": MEMORY_BYTES, "disk_bytes": DISK_BYTES, "boot": True}


@pytest.fixture(scope="module")
def daemon(tiny_image: Image) -> Iterator[Daemon]:
    with real_home(tiny_image) as made:
        yield made


@pytest.fixture(scope="module")
def guest(daemon: Daemon) -> Sandbox:
    return daemon.run(name="web")


def post(daemon: Daemon, path: str, body: object, key: str) -> Any:
    """One request under a key; its answer, which must be a success."""
    made = http.client.HTTPConnection("diapause")
    made.sock = connect(daemon.home, daemon_command)
    made.sock.settimeout(2 * WAIT_S)
    made.request("POST", path, json.dumps(body), {"Connection": "close", "Idempotency-Key": key})
    response = made.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return answer


def killed(daemon: Daemon, place: Place, path: str, body: object, key: str) -> None:
    """The daemon dies at a place of what the request does."""
    tap = Tap(daemon.home)
    tap.hold(place)
    call = Aside(lambda: post(daemon, path, body, key))
    tap.wait_held()
    daemon.kill()
    assert isinstance(call.wait(), (OSError, http.client.HTTPException))
    tap.clear()


def answered() -> Place:
    """Where the answer is about to be kept: all is made, and nobody knows of it."""
    return Place("the answer", "requests", "NEW.answer IS NOT NULL", "UPDATE")


def kept() -> Place:
    """Where the key is about to be kept."""
    return Place("the key", "requests", "1")


RUN_PLACES = [kept(), before_step("run", "spawn"), at_end("run"), answered()]


@pytest.mark.parametrize("place", RUN_PLACES, ids=lambda place: place.name.replace(" ", "-"))
def test_a_run_whose_daemon_died(daemon: Daemon, guest: Sandbox, place: Place) -> None:
    """Asked again there is one sandbox, the one that was made where it was made."""
    key = f"run {place.name}".replace(" ", "-")
    killed(daemon, place, "/v1/sandboxes", RUN, key)
    before = {row.sandbox for row in daemon.client.sandboxes(everything=True)} - {guest.id}
    answer = post(daemon, "/v1/sandboxes", RUN, key)
    rows = {row.sandbox for row in daemon.client.sandboxes(everything=True)} - {guest.id}
    assert rows == {answer["sandbox"]}
    assert before in (set(), rows)
    assert bool(before) == (place in (at_end("run"), answered()))
    made = Sandbox(daemon, answer["sandbox"])
    assert made.sh("echo up").strip() == "up"
    assert post(daemon, "/v1/sandboxes", RUN, key)["sandbox"] == made.id
    made.remove()


@pytest.mark.parametrize("verb", ["first-run", "warm-run"])
def test_a_run_from_a_ready_snapshot_whose_daemon_died(
    daemon: Daemon, guest: Sandbox, verb: str
) -> None:
    """Its verb has another name than that of one that only boots."""
    asked = {**RUN, "boot": False}
    daemon.client.gc(GcRequest())  # a ready snapshot, if one is there
    if verb == "warm-run":
        daemon.run_as_asked()[0].remove()
    killed(daemon, at_end(verb), "/v1/sandboxes", asked, verb)
    [made] = {row.sandbox for row in daemon.client.sandboxes(everything=True)} - {guest.id}
    assert post(daemon, "/v1/sandboxes", asked, verb)["sandbox"] == made
    rows = {row.sandbox for row in daemon.client.sandboxes(everything=True)} - {guest.id}
    assert rows == {made}
    Sandbox(daemon, made).remove()


def test_a_fork_whose_daemon_died(daemon: Daemon, guest: Sandbox) -> None:
    """One of two was there already: afterwards there are two, not three."""
    snapshot = guest.save("disk").snapshot
    body = {"source": snapshot, "count": 2}
    place = Place(
        "the second fork's end", "operations",
        "NEW.outcome = 'done' AND NEW.verb = 'fork' AND EXISTS (SELECT 1 FROM operations "
        "WHERE verb = 'fork' AND outcome = 'done' AND request = NEW.request)", "UPDATE",
    )  # fmt: skip
    killed(daemon, place, "/v1/forks", body, "fork")
    answer = post(daemon, "/v1/forks", body, "fork")
    rows = {row.sandbox for row in daemon.client.sandboxes(everything=True)} - {guest.id}
    assert rows == set(answer["sandboxes"])
    assert len(rows) == 2
    assert post(daemon, "/v1/forks", body, "fork") == answer
    for sandbox in rows:
        Sandbox(daemon, sandbox).remove()


@pytest.mark.parametrize("place", [before_step("save", "keep"), answered()], ids=["keep", "answer"])
def test_a_save_whose_daemon_died(daemon: Daemon, guest: Sandbox, place: Place) -> None:
    """One snapshot."""
    before = {row.id for row in daemon.client.snapshots()}
    path, body, key = f"/v1/sandboxes/{guest.id}/snapshots", {"durability": "process"}, place.name
    key = key.replace(" ", "-")
    killed(daemon, place, path, body, key)
    answer = post(daemon, path, body, key)
    made = {row.id for row in daemon.client.snapshots()} - before
    assert made == {answer["snapshot"]}
    assert post(daemon, path, body, key) == answer
