"""Operations at the API: ids, progress, cancelling, and keys under which a request is done once."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from diapause import limits
from diapause.daemon.start import try_connect
from diapause.errors import Cancelled, OperationNotFound
from diapause.model import CaptureRequest, OperationAnswer, RunRequest
from tests.framework.fake_home import FakeHome, eventually, gone
from tests.framework.sandbox import Aside

ID = "0123456789abcdef"
WAIT_S = 60.0


def post(
    place: FakeHome, path: str, body: object, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """One request of its own; its status, headers and answer."""
    connected = try_connect(place.home)
    assert connected is not None
    connected.settimeout(WAIT_S)
    made = http.client.HTTPConnection("diapause")
    made.sock = connected
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    made.request("POST", path, json.dumps(body), {"Connection": "close", **named})
    response = made.getresponse()
    raw = response.read()
    found = {name.lower(): value for name, value in response.getheaders()}
    return response.status, found, json.loads(raw)


@pytest.fixture
def stalled(place: FakeHome) -> FakeHome:
    """A home with the sandbox `web`, whose verbs are held until the file `stall` goes."""
    place.client.run(RunRequest(name="web"))
    (place.home.root / "stall").touch()
    return place


def pausing(place: FakeHome, **headers: str) -> Aside:
    """A pause that is held, under way when this returns."""
    aside = Aside(lambda: post(place, "/v1/sandboxes/web/pause", {}, **headers))
    eventually("the verb's begin", (place.home.root / "stalled").exists, WAIT_S)
    return aside


def ended(place: FakeHome, operation: str) -> OperationAnswer:
    def over() -> bool:
        return place.client.operation(operation).state not in ("running", "cancelling")

    eventually("the operation's end", over, WAIT_S)
    return place.client.operation(operation)


def test_every_verb_has_an_operation(place: FakeHome) -> None:
    """Its id is answered, the client's own if it chose one, also with an error."""
    place.client.sandboxes()
    status, headers, answer = post(place, "/v1/sandboxes", {"name": "web"}, Operation_Id=ID)
    assert (status, headers["operation-id"]) == (200, ID)
    found = place.client.operation(ID)
    assert (found.state, found.verb, found.error) == ("done", "runSandbox", None)
    status, headers, answer = post(place, "/v1/sandboxes", {"name": "web"})
    assert status == 409
    found = place.client.operation(headers["operation-id"])
    assert found.state == "failed"
    assert found.error == answer["error"]
    with pytest.raises(OperationNotFound):
        place.client.operation("f" * 16)
    with pytest.raises(OperationNotFound):
        place.client.cancel("no id")


@pytest.mark.parametrize("wanted", ["", "0123", "Z" * 16, "0" * 17])
def test_an_operation_id_that_is_none_is_refused(place: FakeHome, wanted: str) -> None:
    place.client.sandboxes()
    status, _, answer = post(place, "/v1/sandboxes", {}, Operation_Id=wanted)
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert place.client.sandboxes() == []


def test_an_operation_is_cancelled(stalled: FakeHome) -> None:
    aside = pausing(stalled, Operation_Id=ID)
    found = stalled.client.operation(ID)
    assert (found.state, found.sandbox) == ("running", "web")
    assert found.progress is not None
    assert (found.progress.done_bytes, found.progress.total_bytes) == (3_000_000, 9_000_000)
    status, _, answer = post(stalled, "/v1/sandboxes", {}, Operation_Id=ID)
    assert (status, "under way" in answer["error"]["message"]) == (400, True)
    assert stalled.client.cancel(ID).state == "cancelling"
    status, headers, answer = aside.result()
    assert (status, headers["operation-id"]) == (Cancelled.status, ID)
    assert answer["error"]["code"] == "cancelled"
    assert stalled.client.operation(ID).state == "cancelled"
    assert stalled.client.cancel(ID).state == "cancelled"
    assert stalled.client.inspect("web").state == "running"


def test_a_jammed_sandbox_leaves_threads_to_the_others(stalled: FakeHome) -> None:
    """Its line is bounded; another sandbox is run, and what waits can be cancelled."""
    count = limits.LOCK_WAITERS_MAX + 8
    with ThreadPoolExecutor(count) as pool:
        asked = [
            pool.submit(post, stalled, "/v1/sandboxes/web/pause", {}, Operation_Id=f"{number:016x}")
            for number in range(count)
        ]
        eventually("the refusals", lambda: sum(one.done() for one in asked) >= 7, WAIT_S)
        stalled.client.run(RunRequest(name="other"))
        for number in range(count):
            stalled.client.cancel(f"{number:016x}")
        answers = [one.result(WAIT_S)[2]["error"]["code"] for one in asked]
    assert sorted(set(answers)) == ["busy", "cancelled"]
    assert answers.count("busy") == count - limits.LOCK_WAITERS_MAX - 1
    (stalled.home.root / "stall").unlink()
    assert not stalled.client.pause("web", CaptureRequest()).already


# -- keys -----------------------------------------------------------------------------------------


def test_a_request_under_a_key_is_done_once(place: FakeHome) -> None:
    place.client.sandboxes()
    first = post(place, "/v1/sandboxes", {"name": "web", "cpus": 1}, Idempotency_Key="k")
    again = post(place, "/v1/sandboxes", {"cpus": 1, "name": "web"}, Idempotency_Key="k")
    assert (first[0], again[0]) == (200, 200)
    assert first[2] == again[2]
    assert len(place.client.sandboxes()) == 1
    other = post(place, "/v1/sandboxes", {"name": "db"}, Idempotency_Key="k")
    assert (other[0], other[2]["error"]["code"]) == (422, "key_reused")
    status, _, answer = post(place, "/v1/sandboxes", {"cpus": 1, "name": "db"})
    assert (status, answer["name"]) == (200, "db")


def test_a_request_that_comes_twenty_times_at_once_is_done_once(place: FakeHome) -> None:
    place.client.sandboxes()
    with ThreadPoolExecutor(20) as pool:
        asked = [
            pool.submit(post, place, "/v1/sandboxes", {"name": "web"}, Idempotency_Key="k")
            for _ in range(20)
        ]
        answers = [one.result(WAIT_S) for one in asked]
    assert {status for status, _, _ in answers} == {200}
    assert len({answer["sandbox"] for _, _, answer in answers}) == 1
    assert len(place.client.sandboxes()) == 1


def test_a_key_is_kept_over_a_restart(place: FakeHome) -> None:
    place.client.sandboxes()
    first = post(place, "/v1/sandboxes", {"name": "web"}, Idempotency_Key="k")
    pid = place.daemon_pid
    os.kill(pid, signal.SIGKILL)
    eventually("the end of the daemon", lambda: gone(pid), WAIT_S)
    place.client.sandboxes()
    assert post(place, "/v1/sandboxes", {"name": "web"}, Idempotency_Key="k")[2] == first[2]


def test_a_failed_request_is_begun_anew(stalled: FakeHome) -> None:
    """Whoever waited for the one that was cancelled is told so; the next one is done."""
    first = pausing(stalled, Idempotency_Key="k", Operation_Id=ID)
    second = Aside(lambda: post(stalled, "/v1/sandboxes/web/pause", {}, Idempotency_Key="k"))
    stalled.client.cancel(ID)
    assert first.result()[2]["error"]["code"] == "cancelled"
    (stalled.home.root / "stall").unlink()
    assert second.result()[0] in (200, Cancelled.status)
    assert post(stalled, "/v1/sandboxes/web/pause", {}, Idempotency_Key="k")[0] == 200


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * (limits.IDEMPOTENCY_KEY_LENGTH_MAX + 1)])
def test_a_key_that_is_none_is_refused(place: FakeHome, key: str) -> None:
    place.client.sandboxes()
    status, _, answer = post(place, "/v1/sandboxes", {}, Idempotency_Key=key)
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert place.client.sandboxes() == []


# -- the command line -----------------------------------------------------------------------------


def interrupted(place: FakeHome, *words: str) -> subprocess.Popen[bytes]:
    """A verb that is held, and was told to stop once."""
    process = place.spawn(*words)
    eventually("the verb's begin", (place.home.root / "stalled").exists, WAIT_S)
    process.send_signal(signal.SIGINT)
    return process


def test_an_interrupt_cancels_and_says_what_is_the_case(stalled: FakeHome) -> None:
    process = interrupted(stalled, "--json", "pause", "web")
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert b"cancelled: what it had done was put back; sandbox web is running" in err
    assert json.loads(out)["error"]["code"] == "cancelled"


def test_a_second_interrupt_leaves_at_once(stalled: FakeHome) -> None:
    """Though the daemon is still at it; it goes on."""
    (stalled.home.root / "deaf").touch()
    process = interrupted(stalled, "pause", "web")
    assert process.stderr is not None
    assert b"interrupt again" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert b"the daemon goes on" in err
    (stalled.home.root / "stall").unlink()
    eventually("the verb's end", lambda: stalled.client.inspect("web").state == "paused", WAIT_S)


def test_progress_is_plain_where_there_is_no_terminal(stalled: FakeHome) -> None:
    """A line with figures, a rate and the time that is left."""
    process = stalled.spawn("pause", "web")
    assert process.stderr is not None
    said = process.stderr.readline().decode()
    (stalled.home.root / "stall").unlink()
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "stalling 2.9 MiB of 8.6 MiB" in said
    assert "s left" in said
    assert b"stalling" not in err
